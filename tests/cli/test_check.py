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
    assert "ppo, a run that can start" in out
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
    assert f"{command}, a run that can start" in out


@pytest.mark.parametrize("command", ["grpo", "dr-grpo", "dapo", "rloo", "reinforce++", "remax"])
def test_methods_of_like_keys_are_told_by_their_sections(room, capsys, command):
    values = room.values()
    del values["ppo"]
    values[{"reinforce++": "reinforce_pp"}.get(command, command.replace("-", "_"))] = {"num_iterations": 1}
    values["generation"]["num_generations"] = 2
    code, out, err = check(capsys, room.config(values))
    assert code == 0, out + err
    assert f"{command}, a run that can start" in out


def only_data_and_model(room, rows, **more):
    """A config of the two keys that sft and reward share."""
    values = {**room.values("reward"), **more}
    values["data"]["dataset_name"] = room.rows("rows.jsonl", rows)
    return room.config(values)


@pytest.mark.parametrize(
    ("row", "command"),
    [
        ({"prompt": "the film was", "chosen": " good", "rejected": " bad"}, "reward"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}]}, "sft"),
        ({"prompt": "the film was", "completion": " good"}, "sft"),
        ({"text": "the film was good"}, "sft"),
    ],
)
def test_rows_tell_the_command_where_keys_do_not(room, capsys, row, command):
    code, out, err = check(capsys, only_data_and_model(room, [row]))
    assert code == 0, out + err
    assert f"{command}, a run that can start" in out


def test_a_file_can_say_its_command_beside_others(room, capsys):
    """Pairs without a telling key are taken for a reward model's; the same file is checked as SFT too."""
    file = room.config(command="reward")
    code, out, err = check(capsys, f"sft:{file}", file, f"reward:{file}", "--command", "sft")
    assert code == 0, out + err
    assert [line for line in out.splitlines() if "can start" in line] == [
        f"{file}: {command}, a run that can start" for command in ("sft", "sft", "reward")
    ]
    code, _, err = check(capsys, f"generate:{file}")
    assert code == 2
    assert "`generate` in generate:" in err
    assert "trains nothing; give one of sft," in err


def test_a_config_that_could_be_of_two_commands_has_its_problems_listed_all_the_same(room, capsys):
    """Data that cannot be read do not tell which it is."""
    values = room.values("reward") | {"max_step": 3}
    values["data"]["dataset_name"] = str(room.path / "gone.jsonl")
    values["model"]["num_frozen_layers"] = 99
    file = room.config(values)
    code, out, _ = check(capsys, file)
    assert code == 2
    for words in (
        f"{file} (sft or reward): 4 problems\n",
        "unknown key `max_step`; did you mean `max_steps`?",
        "gone.jsonl",
        "`model.num_frozen_layers` = 99, but the model",
        f"could be of sft or reward; say which, as in `meshift check sft:{file}`",
    ):
        assert words in out, words
    out = check(capsys, file, f"model.model_name_or_path={room.path / 'gone'}")[1]
    assert f"`model.model_name_or_path`: there is no model folder {room.path / 'gone'}" in out


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


def test_weights_are_looked_at_though_they_are_not_read(room, capsys):
    from bad_input import edit_json

    folder = room.model_with(lambda f: edit_json(f / "config.json", intermediate_size=40))
    code, out, _ = check(capsys, room.config(), f"actor.model_name_or_path={folder}")
    assert code == 2
    assert "the config and the weights are not of one model" in out
    assert main(room.dry(f"actor.model_name_or_path={folder}")) == 2
    assert "the config and the weights are not of one model" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_refused_with_the_numbers(room, capsys, monkeypatch):
    from meshift.runtime import preflight
    from meshift.runtime.machine import Memory

    monkeypatch.setattr(preflight, "device_memory", lambda: Memory(device="this machine", total=1000, free=1000))
    code, out, _ = check(capsys, room.config())
    assert code == 2
    assert "this machine has 0.00 GB: it will not fit; use smaller models" in out
    assert main(room.dry()) == 0, "the run may be meant for another machine"
    assert "it will not fit" in " ".join(capsys.readouterr().out.split())


def test_several_configs_are_all_looked_at(room, capsys):
    good = room.config()
    bad = room.path / "bad.yaml"
    bad.write_text("max_steps: [")
    code, out, err = check(capsys, bad, good, "max_steps=3")
    assert code == 2
    assert "ppo, a run that can start" in out
    assert "is not valid YAML" in out
    assert "1 of 2 configs cannot be run" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no config is named"),
        (["max_steps=3"], "no config is named"),
        (["x.yaml", "--command", "generate"], "--command generate trains nothing; give one of"),
    ],
)
def test_a_wrong_command_line_is_told_so(words, expected, capsys):
    code, out, err = check(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"meshift: {expected}")
