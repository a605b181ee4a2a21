"""A folder of good input, of which each case of `test_bad_input_*.py` spoils one thing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from meshift.cli.main import main

PROMPTS = [{"prompt": "the film was", "answer": "good"}, {"prompt": "a story", "answer": "bad"}]
PAIRS = [
    {"prompt": "the film was", "chosen": " good", "rejected": " bad"},
    {"prompt": "a story", "chosen": " great", "rejected": " dull"},
]
REWARDS = "def good(completions, **columns):\n    return [float('good' in c) for c in completions]\n"


@dataclass(frozen=True)
class Case:
    """`arguments(room)` spoils something and returns the command line; `words` are what the sentence must say."""

    name: str
    arguments: Callable[["Room"], list[str]]
    words: tuple[str, ...]


class Room:
    """A folder with a prompts file, a pairs file, a reward function, and the tiny models."""

    def __init__(self, path: Path, model: Path, reward: Path) -> None:
        self.path, self.model, self.reward = path, model, reward
        self.rows("prompts.jsonl", PROMPTS)
        self.rows("pairs.jsonl", PAIRS)
        (path / "rewards.py").write_text(REWARDS, encoding="utf-8")

    def rows(self, name, rows):
        """A data file, from rows, text or bytes."""
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        content = rows if isinstance(rows, bytes) else rows.encode()
        (self.path / name).write_bytes(content)
        return str(self.path / name)

    def values(self, command="ppo"):
        """A config that is right, as nested values."""
        shared = {"output_dir": str(self.path / "run"), "dtype": "float32", "max_steps": 1}
        if command == "reward":
            data = {"dataset_name": str(self.path / "pairs.jsonl"), "batch_size": 2}
            return {**shared, "data": data, "model": {"model_name_or_path": str(self.model)}}
        return {
            **shared,
            "data": {"dataset_name": str(self.path / "prompts.jsonl"), "batch_size": 2},
            "actor": {"model_name_or_path": str(self.model)},
            "reward": {"functions": [{"function": f"{self.path / 'rewards.py'}:good"}]},
            "generation": {"max_completion_length": 4},
            "ppo": {"num_mini_batches": 1},
        }

    def config(self, content=None, command="ppo"):
        """The config's file, from values, text or bytes."""
        content = self.values(command) if content is None else content
        text = yaml.safe_dump(content) if isinstance(content, dict) else content
        file = self.path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    def dry(self, *overrides, content=None, command="ppo"):
        """The command line of a dry run."""
        return [command, "--config", self.config(content, command), "--dry-run", *overrides]

    def model_with(self, spoil, source=None):
        """A copy of the tiny model that `spoil(folder)` has been at."""
        folder = self.path / "model"
        shutil.copytree(source or self.model, folder)
        spoil(folder)
        return str(folder)


def edit_json(path, **changes):
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(folder, edit):
    """`edit(tensors)` in place, in a folder's one safetensors file."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def tree(path):
    """Every file with its content, every folder and link: what must be the same after a refused command."""
    return {
        str(p.relative_to(path)): str(p.readlink()) if p.is_symlink() else p.is_dir() or p.read_bytes()
        for p in path.rglob("*")
        if "__pycache__" not in p.parts  # of reward functions that are imported
    }


def refused(arguments, words, room, capsys, exit_code=2):
    """Run the command line; it must say these words in one sentence, and leave everything as it was."""
    before = tree(room.path)
    code = main(arguments)
    out, err = capsys.readouterr()
    assert err.startswith("meshift: "), err
    assert err.count("\n") == 1, f"more than one line:\n{err}"
    assert not [word for word in words if word not in err], err
    assert (code, out) == (exit_code, "")
    assert len(err) < 1000, "a sentence, not a dump"
    assert tree(room.path) == before
