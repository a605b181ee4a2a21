"""Malformed configs: one sentence that says what, where and what to do; exit code 2; nothing written or lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import Case, refused

from meshift.cli.main import main


def text(old, new):
    """A case's command line: the base config's YAML with a piece of text replaced."""

    def arguments(room):
        content = BASE.format(folder=room.path)
        assert old in content
        return room.dry(content=content.replace(old, new))

    return arguments


def keys(*overrides):
    return lambda room: room.dry(*overrides)


def raw(content):
    return lambda room: room.dry(content=content)


def instead_of_config(make):
    """`make(path)` puts something else where the config file should be."""

    def arguments(room):
        path = room.path / "odd.yaml"
        make(path)
        return ["ppo", "--config", str(path), "--dry-run"]

    return arguments


BASE = """\
output_dir: {folder}/run
max_steps: 1
data:
  dataset_name: {folder}/prompts.jsonl
actor:
  model_name_or_path: absent/model
reward:
  functions:
    - function: {folder}/rewards.py:good
"""
CASES = [
    Case("a misspelt key", text("max_steps", "max_step"), ("unknown key `max_step`", "did you mean `max_steps`?")),
    Case("a misspelt key of a section", keys("actor.lerning_rate=1"), ("did you mean `actor.learning_rate`?",)),
    Case(
        "a misspelt key of a list item",
        text(":good", ":good\n      wieght: 2"),
        ("unknown key `reward.functions[0].wieght`", "reward.functions[].weight"),
    ),
    Case("a misspelt section", text("actor:", "actr:"), ("unknown key `actr`", "did you mean `actor`?")),
    Case("a key of another place", keys("kl_coef=0.1"), ("unknown key `kl_coef`", "`ppo.kl_coef`")),
    Case("a word for a number", keys("max_steps=many"), ("`max_steps`", "integer", "'many'")),
    Case("half a step", keys("max_steps=2.5"), ("`max_steps`", "2.5")),
    Case("yes for a number", keys("data.batch_size=yes"), ("`data.batch_size`", "True")),
    Case("a number for a switch", keys("ppo.adaptive_kl=7"), ("`ppo.adaptive_kl`", "7")),
    Case("null where a value is needed", keys("data.dataset_name=null"), ("`data.dataset_name`", "None")),
    Case("a list for a section", keys("actor=[1]"), ("`actor`", "[1]")),
    Case("a section for a value", keys("max_steps={a: 1}"), ("`max_steps`", "{'a': 1}")),
    Case("a text for a list", keys("report_to=tensorboard"), ("`report_to`", "list")),
    Case("an unknown choice", keys("ppo.kl_estimator=k4"), ("`ppo.kl_estimator`", "'k1', 'k2' or 'k3'", "'k4'")),
    Case("a negative rate", keys("actor.learning_rate=-1"), ("`actor.learning_rate`", "greater than 0")),
    Case("NaN", keys("reward.weight=.nan"), ("`reward.weight`", "finite number")),
    Case("a number too large to be one", keys("actor.learning_rate=1e400"), ("`actor.learning_rate`", "finite")),
    Case("a date for a text", keys("output_dir=2024-01-01"), ("`output_dir`", "string")),
    Case(
        "a probability above one", keys("generation.top_p=1.5"), ("`generation.top_p`", "less than or equal to 1")
    ),
    Case("an override without a value", keys("max_steps"), ("'max_steps'", "write it as key.sub=value")),
    Case("an override without a key", keys("=3"), ("'=3'", "write it as key.sub=value")),
    Case("an override into a value", keys("output_dir.x=3"), ("'output_dir'", "is not a section")),
    Case("an override that breaks off", keys("data=[1"), ("'data=[1'", "is not valid YAML")),
    Case(
        "an override with a dash too many", keys("--max_steps=3"), ("unknown option `--max_steps=3`", "max_steps=")
    ),
    Case("YAML that breaks off", text("reward:\n", "reward: [\n"), ("run.yaml, line", "is not valid YAML")),
    Case("a tab", text("  dataset_name", "\tdataset_name"), ("run.yaml, line 4", "is not valid YAML")),
    Case(
        "a key given twice",
        text("max_steps: 1\n", "max_steps: 1\nmax_steps: 2\n"),
        ("run.yaml, line 3", "`max_steps` stands there twice", "keep one"),
    ),
    Case("nested beyond reason", raw("data: " + "[" * 5000), ("run.yaml", "nested too deeply")),
    Case("an empty file", raw(""), ("is needed in", "run.yaml")),
    Case("a list for a config", raw("- a\n- b\n"), ("run.yaml", "must hold keys and values")),
    Case("a binary file", raw(bytes(range(256))), ("cannot read the config file", "run.yaml")),
    Case("a NUL", text("max_steps: 1", 'dtype: "a\\0b"'), ("`dtype` holds a NUL character",)),
    Case("a folder for a config", instead_of_config(lambda p: p.mkdir()), ("odd.yaml", "irectory")),
    Case("no config file", instead_of_config(lambda p: None), ("there is no config file", "odd.yaml")),
    Case(
        "a link to nowhere",
        instead_of_config(lambda p: p.symlink_to(p.with_name("gone"))),
        ("there is no config file", "odd.yaml"),
    ),
    Case(
        "a link to itself",
        instead_of_config(lambda p: p.symlink_to(p)),
        ("cannot read the config file", "odd.yaml"),
    ),
    Case(
        "keys that exclude each other",
        keys("ppo.length_limit_is_end=true", "ppo.missing_eos_penalty=1"),
        ("length_limit_is_end and missing_eos_penalty", "keep one"),
    ),
    Case("least above most", keys("generation.min_new_tokens=9"), ("min_new_tokens", "max_completion_length")),
    Case(
        "more updates than sequences",
        keys("ppo.num_mini_batches=9"),
        ("`ppo.num_mini_batches` = 9", "2 sequences"),
    ),
    Case("no reward", keys("reward=null"), ("a reward is needed", "`reward.model_name_or_path`")),
    Case("no actor", keys("actor.model_name_or_path=null"), ("`actor.model_name_or_path` is needed",)),
    Case("no config at all", lambda room: ["ppo"], ("a config is needed", "--config run.yaml")),
    Case("a config without its option", lambda room: ["ppo", room.config()], ("did you mean `--config",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_malformed_config_is_refused_in_a_sentence(case, room, capsys):
    refused(case.arguments(room), case.words, room, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_config_that_may_not_be_read_is_refused_in_a_sentence(room, capsys):
    file = room.config()
    os.chmod(file, 0)
    try:
        assert main(["ppo", "--config", file]) == 2
    finally:
        os.chmod(file, 0o600)
    assert "cannot read the config file" in capsys.readouterr().err


def test_the_config_that_every_case_spoils_is_right_itself(room, capsys):
    assert main(room.dry()) == 0, capsys.readouterr().err


def test_a_real_process_shows_no_traceback(room):
    arguments = room.dry("actor.lerning_rate=1")
    done = subprocess.run(
        [sys.executable, "-m", "meshift.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "meshift: unknown key `actor.lerning_rate`; did you mean `actor.learning_rate`?\n"


RECIPES = {
    "grpo": "grpo_sentiment",
    "ppo": "quickstart",
    "sft": "quickstart_sft",
    "reward": "quickstart_reward",
    "dpo": "hh_dpo",
    "kto": "kto_sentiment",
    "orpo": "orpo_sentiment",
    "raft": "raft_sentiment",
    "online-dpo": "online_dpo_sentiment",
}
ALIKE = {("sft", "reward"), ("dpo", "orpo"), ("kto", "orpo")}
"""The first takes the second one's recipe, which has no key of its own."""


@pytest.mark.parametrize("given", RECIPES)
@pytest.mark.parametrize("meant", RECIPES)
def test_a_config_of_another_command_is_told_to_be(capsys, given, meant):
    if given == meant or (given, meant) in ALIKE:
        return
    file = str(Path(__file__).parents[2] / "recipes" / f"{RECIPES[meant]}.yaml")
    assert main([given, "--config", file, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f", not of `meshift {given}`; did you mean `meshift {meant} --config {file}`?" in said


def test_a_misspelt_key_is_no_other_commands(room, capsys):
    assert main(room.dry("actr.learning_rate=1")) == 2
    said = capsys.readouterr().err
    assert "unknown key `actr`; did you mean `actor`?" in said
