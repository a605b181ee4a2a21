"""`meshift check` lists all that is wrong with a config, tells its command, and says what would run."""

import pytest
from bad_input import tree

from meshift.cli.main import main


def check(capsys, *words):
    code = main(["check", *map(str, words)])
    return code, *capsys.readouterr()


def test_a_config_that_can_run_gets_its_arithmetic_and_memory(room, capsys):
    before = {**tree(room.path), "run.yaml": None}
    code, out, err = check(capsys, room.config())
    assert (code, err) == (0, "")
    assert "a ppo run that can start" in out
    assert "2 prompts x 1 generations" in out
    assert "activations come on top" in out
    assert {**tree(room.path), "run.yaml": None} == before


@pytest.mark.parametrize("command", ["ppo", "reward"])
def test_the_command_is_told_from_the_keys(room, capsys, command):
    values = room.values(command)
    if command == "reward":
        values["reward"] = {"center_rewards_coefficient": 0.01}
    code, out, err = check(capsys, room.config(values))
    assert code == 0, out + err
    assert f"a {command} run that can start" in out


def test_a_config_of_several_commands_asks_for_one_and_takes_it(room, capsys):
    """Data and a model: that may be a reward model or a fine-tuned one."""
    file = room.config(command="reward")
    code, out, _ = check(capsys, file)
    assert code == 2
    assert "could be of" in out
    assert "--command reward" in out
    assert check(capsys, file, "--command", "reward")[0] == 0
    named = room.path / "hh_reward.yaml"
    named.write_text((room.path / "run.yaml").read_text())
    assert check(capsys, named)[0] == 0


def test_all_problems_are_listed_at_once(room, capsys):
    values = room.values()
    values["actor"] = {"model_name_or_path": str(room.path / "gone"), "lerning_rate": 1}
    values["max_step"] = 3
    values["seed"] = -1
    values["data"]["dataset_name"] = room.rows("bad.jsonl", '{"prompt": "a"}\n{"prompt": ')
    values["reward"]["functions"][0]["function"] = f"{room.path}/rewards.py:absent"
    code, out, err = check(capsys, room.config(values))
    assert code == 2
    assert err == f"meshift: {room.path / 'run.yaml'} cannot be run; the problems are listed above\n"
    assert f"{room.path / 'run.yaml'} (ppo): 6 problems\n" in out
    for words in (
        "unknown key `actor.lerning_rate`; did you mean `actor.learning_rate`?",
        "unknown key `max_step`; did you mean `max_steps`?",
        "`seed` in",
        f"`actor.model_name_or_path`: there is no model folder {room.path / 'gone'}",
        "bad.jsonl:2",
        "has no function 'absent'",
    ):
        assert words in out, words


def test_weights_are_looked_at_though_a_dry_run_does_not_read_them(room, capsys):
    from bad_input import edit_json

    folder = room.model_with(lambda f: edit_json(f / "config.json", intermediate_size=40))
    code, out, _ = check(capsys, room.config(), f"actor.model_name_or_path={folder}")
    assert code == 2
    assert "the config and the weights are not of one model" in out


def test_a_run_that_does_not_fit_is_refused_with_the_numbers(room, capsys, monkeypatch):
    from meshift.runtime import preflight
    from meshift.runtime.machine import Memory

    monkeypatch.setattr(preflight, "device_memory", lambda: Memory(device="this machine", total=1000, free=1000))
    code, out, _ = check(capsys, room.config())
    assert code == 2
    assert "this machine has 0.00 GB: it will not fit; use smaller models" in out


def test_several_configs_are_all_looked_at(room, capsys):
    good = room.config()
    bad = room.path / "bad.yaml"
    bad.write_text("max_steps: [")
    code, out, err = check(capsys, bad, good, "max_steps=3")
    assert code == 2
    assert "a ppo run that can start" in out
    assert "is not valid YAML" in out
    assert "1 of 2 configs cannot be run" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the following arguments are required: CONFIG"),
        (["max_steps=3"], "no config is named"),
        (["x.yaml", "--command", "generate"], "--command generate trains nothing; give one of"),
    ],
)
def test_a_wrong_command_line_is_told_so(words, expected, capsys):
    code, out, err = check(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"meshift: {expected}")
