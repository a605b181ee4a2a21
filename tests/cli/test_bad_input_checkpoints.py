"""Malformed checkpoints: the one before is used, with a warning; or a sentence, exit code 2, nothing touched."""

import hashlib
import json
import shutil

import pytest
from bad_input import PROMPTS, Room, refused

from meshift.cli.main import main

STEPS = ("max_steps=3", "save_steps=1", "save_total_limit=null", "report_to=[]")


@pytest.fixture(scope="session")
def begun(tmp_path_factory, tiny_model, tiny_reward):
    """A room with a run that has checkpoints after its first and second step, and was killed in its third."""
    room = Room(tmp_path_factory.mktemp("begun"), tiny_model, tiny_reward)
    assert main([word for word in room.dry(*STEPS) if word != "--dry-run"]) == 0
    shutil.rmtree(room.path / "run" / "final")
    shutil.rmtree(room.path / "run" / "final_critic")
    return room


class Spoiled:
    """A copy of the run, to be spoiled and resumed."""

    def __init__(self, begun, path):
        self.begun = begun
        self.path = path
        self.run = path / "run"
        shutil.copytree(begun.path / "run", self.run)

    def resume(self, *overrides, command="ppo"):
        config = self.path / "run.yaml"
        config.write_bytes((self.begun.path / "run.yaml").read_bytes())
        if command != "ppo":
            config.write_text("model: {model_name_or_path: absent}\ndata: {dataset_name: absent.jsonl}\n")
        words = [command, "--config", str(config), *STEPS, f"output_dir={self.run}", *overrides]
        return [*words, "--resume"]

    def both(self):
        return [self.run / f"checkpoint-{step}" for step in (1, 2)]


@pytest.fixture
def spoiled(begun, tmp_path):
    return Spoiled(begun, tmp_path)


def torn(path):
    path.write_bytes(path.read_bytes()[:-7])


def tampered(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewritten(checkpoint, **changes):
    """The manifest with other values, and a sum of itself that fits them: as another version would write it."""
    path = checkpoint / "manifest.json"
    content = {**json.loads(path.read_text()), **changes}
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def each(spoil):
    return lambda s: [spoil(checkpoint) for checkpoint in s.both()]


def nowhere(s):
    for checkpoint in s.both():
        shutil.rmtree(checkpoint)
    (s.run / "LATEST").write_text("checkpoint-7\n")


def a_file(s):
    nowhere(s)
    (s.run / "checkpoint-7").write_text("x")


def untouched(s):
    pass


NONE_WHOLE = ("no checkpoint in", "is whole", "overwrite_output_dir=true")
REFUSED = {
    "torn manifests": (
        each(lambda c: torn(c / "manifest.json")),
        (),
        (*NONE_WHOLE, "cannot be read as a manifest"),
    ),
    "empty manifests": (
        each(lambda c: (c / "manifest.json").write_bytes(b"")),
        (),
        (*NONE_WHOLE, "checkpoint-1/manifest.json cannot be read"),
    ),
    "manifests that are gone": (
        each(lambda c: (c / "manifest.json").unlink()),
        (),
        (*NONE_WHOLE, "checkpoint-2/manifest.json is missing"),
    ),
    "tampered weights": (
        each(lambda c: tampered(c / "actor" / "state.safetensors")),
        (),
        (*NONE_WHOLE, "checkpoint-1/actor/state.safetensors is not as it was written (its sha256 is another)"),
    ),
    "torn weights": (each(lambda c: torn(c / "critic" / "state.safetensors")), (), (*NONE_WHOLE, "instead of")),
    "an edited step": (
        each(lambda c: rewritten(c, step=9)),
        (),
        (*NONE_WHOLE, "is of step 9, which is not what its folder is called"),
    ),
    "LATEST that names nothing": (nowhere, (), (*NONE_WHOLE, "checkpoint-7/manifest.json is missing")),
    "a checkpoint that is a file": (a_file, (), (*NONE_WHOLE, "checkpoint-7/manifest.json cannot be read")),
    "a newer format": (
        lambda s: rewritten(s.both()[1], format=2),
        (),
        ("checkpoint-2/manifest.json is of format 2", "reads format 1", "the version that wrote it"),
    ),
    "a manifest without files": (
        lambda s: rewritten(s.both()[1], format="one", files=None),
        (),
        ("is of format one", "reads format 1"),
    ),
    "another seed": (untouched, ("seed=5",), ("`seed` was 0 in", "is 5 now", "must be the same run")),
    "another batch": (untouched, ("data.batch_size=1",), ("`data.batch_size` was 2 in", "is 1 now")),
    "a decaying rate of another length": (
        untouched,
        ("actor.lr_scheduler_type=linear",),
        ("`actor.lr_scheduler_type` was", "start a new run"),
    ),
    "a folder without its config": (
        lambda s: (s.run / "config.yaml").unlink(),
        (),
        ("cannot resume in", "but no config.yaml that a run wrote", "name the folder of a run"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused_in_a_sentence(name, spoiled, capsys):
    spoil, overrides, words = REFUSED[name]
    spoil(spoiled)
    refused([*spoiled.resume(*overrides), "--dry-run"], words, spoiled, capsys)
    refused(spoiled.resume(*overrides), words, spoiled, capsys)


@pytest.mark.parametrize(("command", "method"), [("sft", "SFT"), ("reward", "Reward")])
def test_the_checkpoint_of_another_method_is_refused_in_a_sentence(command, method, spoiled, capsys):
    words = ("checkpoint-2 is of a run by PPO", f"this one is by {method}; use the command")
    refused(spoiled.resume(command=command), words, spoiled, capsys)


PASSED_OVER = {
    "a torn manifest": (lambda c: torn(c / "manifest.json"), "manifest.json cannot be read as a manifest"),
    "tampered weights": (
        lambda c: tampered(c / "actor" / "state.safetensors"),
        "actor/state.safetensors is not as it was written (its sha256 is another)",
    ),
    "torn weights": (lambda c: torn(c / "critic" / "state.safetensors"), "critic/state.safetensors has "),
    "a file that is gone": (lambda c: (c / "run" / "state.json").unlink(), "run/state.json is missing"),
    "LATEST that names nothing": (shutil.rmtree, "manifest.json is missing"),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(name, spoiled, capsys):
    spoil, words = PASSED_OVER[name]
    spoil(spoiled.run / "checkpoint-2")
    assert main(spoiled.resume()) == 0
    said = "".join(capsys.readouterr().err.split())  # the terminal breaks lines where it likes
    assert "".join(f"checkpoint-2/{words}".split()) in said
    assert "goingonfromcheckpoint-1instead" in said
    steps = [json.loads(line)["training/global_step"] for line in (spoiled.run / "metrics.jsonl").open()]
    assert steps == [1, 2, 3]
    assert (spoiled.run / "final" / "config.json").is_file()


def test_changed_rows_are_refused_when_the_run_has_read_them(spoiled, capsys):
    rows = spoiled.begun.path / "prompts.jsonl"
    before = rows.read_bytes()
    spoiled.begun.rows("prompts.jsonl", [PROMPTS[0], {**PROMPTS[1], "answer": "good"}])
    try:
        assert main(spoiled.resume()) == 2
    finally:
        rows.write_bytes(before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("meshift: the data are not those that ")
    assert len((spoiled.run / "metrics.jsonl").read_text().splitlines()) == 3, "nothing of the run is lost"
