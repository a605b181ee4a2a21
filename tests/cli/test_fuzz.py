"""Whatever a config or a data file holds, the answer is a sentence and an exit code, never a traceback.

The slow profile does the same with thirty times as many examples.
"""

import copy
import os
from contextlib import suppress

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshift.cli.main import COMMANDS, main
from meshift.cli.train import Training
from meshift.config.loading import config_problems, describe_keys, load_config
from meshift.errors import InputError, MeshiftError

FEW = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
SCHEMAS = {name: command.run.schema for name, command in COMMANDS.items() if isinstance(command.run, Training)}
# A model that is not there ends a config that is right before anything large is imported.
VALID = {
    "ppo": {
        "output_dir": "runs/fuzz",
        "data": {"dataset_name": "/absent/prompts.jsonl"},
        "actor": {"model_name_or_path": "/absent/model"},
        "reward": {"functions": [{"function": "/absent/rewards.py:good"}]},
    },
    "reward": {
        "output_dir": "runs/fuzz",
        "data": {"dataset_name": "/absent/pairs.jsonl"},
        "model": {"model_name_or_path": "/absent/model"},
    },
    "sft": {
        "output_dir": "runs/fuzz",
        "data": {"dataset_name": "/absent/texts.jsonl"},
        "model": {"model_name_or_path": "/absent/model"},
    },
    "dpo": {
        "output_dir": "runs/fuzz",
        "data": {"dataset_name": "/absent/pairs.jsonl"},
        "actor": {"model_name_or_path": "/absent/model"},
    },
}
NUMBERS = (0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308, -0.0, float("nan"), float("inf"))
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.text(max_size=12)
    | st.sampled_from(
        ["", "null", "~", "1e-5", "0x10", "[", "{", "- a", "a: b", "\0", "\u2028", "!!python/object"]
    )
    | st.dates()
    | st.binary(max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
# Keys that name files are left alone: whatever is drawn for them may be a path or a module of this machine.
PLACES = ("output_dir", "dataset_name", "eval_dataset_name", "model_name_or_path", "function")


def keys_of(command):
    known = [key for key, _, _ in describe_keys(SCHEMAS[command]) if key.rpartition(".")[2] not in PLACES]
    return st.sampled_from([key for key in known if "[]" not in key]) | st.text(max_size=8)


@st.composite
def configs(draw, command):
    """A config that is right, with some of its keys set to anything, gone, or moved."""
    values = copy.deepcopy(VALID[command])
    for _ in range(draw(st.integers(1, 3))):
        *sections, leaf = draw(keys_of(command)).split(".")
        owner = values
        for name in sections:
            owner = owner.setdefault(name, {}) if isinstance(owner, dict) else owner
        if isinstance(owner, dict):
            owner[leaf] = draw(VALUES)
    if draw(st.booleans()):
        values.pop(draw(st.sampled_from(sorted(values, key=str))))
    return values


def assert_a_sentence(code, capsys, what):
    out, err = capsys.readouterr()
    assert code == 2, (what, out, err)
    assert err.startswith("meshift: "), err
    assert err.count("\n") == 1, err
    assert out == ""


def text_of(values):
    with suppress(yaml.YAMLError):
        return yaml.safe_dump(values, allow_unicode=True)
    return None


def mutated_configs_are_refused(capsys, tmp_path, command, data):
    values = data.draw(configs(command))
    text = text_of(values)
    if text is None:
        return
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert_a_sentence(main([command, "--config", str(file), "--dry-run"]), capsys, text)


def problems_are_sentences(command, data):
    """All problems at once, as `meshift check` lists them; the first of them is what a run would say."""
    values = data.draw(configs(command))
    problems = config_problems(SCHEMAS[command], values)
    assert all(problem and "\n" not in problem for problem in problems)


def bytes_are_refused(capsys, tmp_path, command, data):
    """YAML that is right, with bytes put in, taken out or cut off somewhere."""
    content = bytearray(yaml.safe_dump(VALID[command]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 5))] = data.draw(
            st.binary(max_size=4)
            | st.sampled_from([b"\t", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"? ", b"|", b"%", b"'"])
        )
    file = tmp_path / "run.yaml"
    file.write_bytes(bytes(content))
    with suppress(InputError):
        load_config(SCHEMAS[command], file)


def overrides_are_refused(capsys, command, data):
    key = data.draw(keys_of(command))
    override = f"{key}={data.draw(st.text(max_size=10))}"
    with suppress(InputError):
        load_config(SCHEMAS[command], None, [override])


@pytest.mark.parametrize("command", sorted(VALID))
@FEW
@given(data=st.data())
def test_no_config_shows_a_traceback(command, capsys, tmp_path, data):
    mutated_configs_are_refused(capsys, tmp_path, command, data)
    problems_are_sentences(command, data)
    bytes_are_refused(capsys, tmp_path, command, data)
    overrides_are_refused(capsys, command, data)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(VALID))
@MANY
@given(data=st.data())
def test_no_config_of_many_shows_a_traceback(command, capsys, tmp_path, data):
    mutated_configs_are_refused(capsys, tmp_path, command, data)
    problems_are_sentences(command, data)
    bytes_are_refused(capsys, tmp_path, command, data)
    overrides_are_refused(capsys, command, data)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "", 3, None]),
            "content": st.text(max_size=6) | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2),
        },
    )
    | st.text(max_size=3),
    max_size=4,
)
JSON_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
CELLS = (
    MESSAGES
    | JSON_SCALARS
    | st.lists(JSON_SCALARS, max_size=2)
    | st.dictionaries(st.text(max_size=3), JSON_SCALARS)
)
COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "label", "messages", "text", "margin", "weight"),
    *("data_source", "reward_model", "extra_info", "answer"),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELLS, max_size=5), min_size=1, max_size=3)


@st.composite
def files(draw):
    """JSON Lines of rows of these columns with anything in them, then spoiled here and there."""
    import json

    text = "".join(json.dumps(row, ensure_ascii=draw(st.booleans())) + "\n" for row in draw(ROWS))
    content = bytearray(text.encode("utf-8", errors="surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(
            st.binary(max_size=3) | st.sampled_from([b"{", b"]", b'"', b"\n"])
        )
    return bytes(content)


def loaders(tokenizer):
    """Every way in which a run reads rows."""
    from meshift.data.demonstrations import load_demonstrations
    from meshift.data.preferences import load_preferences
    from meshift.data.prompts import load_prompts

    return (
        lambda name: load_prompts(name, tokenizer, max_prompt_length=20),
        lambda name: load_preferences(name, tokenizer, max_length=40),
        lambda name: load_demonstrations(name, tokenizer, max_length=40, loss_on="assistant"),
    )


def fault_of(load, name):
    try:
        load(name)
    except MeshiftError as error:
        return error
    return None


def rows_are_refused(tokenizer, tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    for load in loaders(tokenizer):
        fault = fault_of(load, str(path))
        if fault is not None:
            assert isinstance(fault, InputError)
            assert "\n" not in str(fault), "one line"
            assert path.name in str(fault), "where"
    os.unlink(path)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from meshift.models.hf.load import load_tokenizer

    return load_tokenizer(tiny_model)


SUFFIXES = st.sampled_from([".jsonl", ".jsonl", ".json", ".csv"])


@FEW
@given(content=files(), suffix=SUFFIXES)
def test_no_data_file_shows_a_traceback(tokenizer, tmp_path, content, suffix):
    rows_are_refused(tokenizer, tmp_path, content, suffix)


@pytest.mark.slow
@MANY
@given(content=files(), suffix=SUFFIXES)
def test_no_data_file_of_many_shows_a_traceback(tokenizer, tmp_path, content, suffix):
    rows_are_refused(tokenizer, tmp_path, content, suffix)
