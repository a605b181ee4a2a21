"""`--plan auto` and `--plan file`: a plan is chosen, or read, before the launch; it is run, and written down."""

import json
from types import SimpleNamespace

import pytest
import yaml

from meshift.cli.main import main
from meshift.config.loading import make_config
from meshift.config.plan import PPOPlan
from meshift.config.runs import PPORunConfig
from meshift.errors import ConfigError
from meshift.layout.mesh import Mesh
from meshift.planner.hardware import Hardware, as_values
from meshift.planner.memory import Machine
from meshift.runtime import auto_plan
from meshift.runtime.plans import num_processes, placements_of

POLICY = ("grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "remax", "online-dpo", "raft")
GIVEN = ("sft", "reward", "dpo", "orpo", "simpo", "kto")


def device(**changes):
    """Devices so slow, with links so fast, that two are better than one."""
    given = {
        "name": "imaginary",
        "memory": 2e9,
        "flops": {"float32": 1e6, "bfloat16": 1e6},
        "memory_rate": 1e9,
        "near_rate": 1e15,
        "far_rate": 1e15,
        "host_rate": 1e9,
        "near_delay": 0.0,
        "far_delay": 0.0,
        "layer_delay": 0.0,
        "reserve": 0.0,
        "machine": Machine(packs=True),
    }
    return Hardware(**{**given, **changes})


@pytest.fixture
def hardware(tmp_path):
    """`hardware(**changes)` -> `launch.hardware=FILE` of two such devices."""

    def write(**changes):
        file = tmp_path / "hardware.json"
        file.write_text(json.dumps(as_values(device(**changes))))
        return f"launch.hardware={file}"

    return write


AUTO = ("plan.auto.devices=2", "plan.auto.seconds=0.5")


def values_of(room, command):
    if command in GIVEN:
        values = room.values("reward")
        if command not in ("sft", "reward"):
            values["actor"] = values.pop("model")
        if command == "kto":
            rows = [{"prompt": "the film was", "completion": " good", "label": bool(i % 2)} for i in range(4)]
            values["data"]["dataset_name"] = room.rows("judged.jsonl", rows)
        return values
    values = room.values()
    if command != "ppo":
        del values["ppo"]
        values["generation"]["num_generations"] = 2
    return values


@pytest.mark.parametrize("command", ["ppo", *GIVEN, *POLICY])
def test_every_training_command_has_its_plan_chosen(room, hardware, capsys, command):
    file = room.config(values_of(room, command))
    assert main([command, "--config", file, "--plan", "auto", *AUTO, hardware(), "--dry-run"]) == 0
    rows = capsys.readouterr().out
    assert "2 processes: " in rows
    assert "GB predicted in the process that needs the most" in " ".join(rows.split())


@pytest.mark.slow
def test_a_chosen_plan_is_run_and_kept_by_the_run_that_goes_on(room, hardware, capsys):
    values = {**values_of(room, "grpo"), "max_steps": 2, "save_steps": 1, "plan": "auto"}
    words = ["grpo", "--config", room.config(values), *AUTO, hardware()]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "the planner chose 2 processes of at most 2 on imaginary" in told.out + told.err
    run = room.path / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    written = json.loads((run / "plan.json").read_text())
    assert config["plan"]["auto"] is None
    assert {role for role, given in config["plan"].items() if given} == set(written["plan"])
    assert written["search"]["bound_s"] <= 1.01 * written["predicted"]["step_s"]
    assert len(written["predicted"]["process_peak_bytes"]) == 2
    events = {event["name"]: event for event in written["predicted"]["events"]}
    assert {"rollout", "train_actor"} <= events.keys()
    assert sum(events["rollout"]["parts_s"].values()) == pytest.approx(
        events["rollout"]["end_s"] - events["rollout"]["start_s"]
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        predicted = {key for key in row if key.startswith("perf/predicted_memory_gb/")}
        assert {key.replace("predicted", "peak") for key in predicted} <= row.keys()
        assert "perf/predicted_memory_gb/train_actor" in predicted

    (run / "final").rename(room.path / "old-final")
    assert main([*words, "--resume", "launch.hardware=null"]) == 0
    told = capsys.readouterr()
    assert "the plan is the one that the run" in told.out + told.err
    assert yaml.safe_load((run / "config.yaml").read_text())["plan"] == config["plan"]
    again = json.loads((run / "plan.json").read_text())
    assert again["search"] == written["search"]
    assert again["hardware"]["name"] != "imaginary"


def test_one_process_where_two_gain_nothing(room, hardware, capsys):
    slow_links = hardware(near_rate=1.0, near_delay=10.0)
    values = {**values_of(room, "sft"), "max_steps": 2, "save_steps": 1}
    words = ["sft", "--config", room.config(values), "plan=auto", *AUTO, slow_links]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "the planner chose one process of at most 2" in told.out + told.err
    assert not (room.path / "run" / "placements.json").exists()
    written = json.loads((room.path / "run" / "plan.json").read_text())
    assert (written["plan"], written["search"]["devices"]) == ({}, 2)
    (room.path / "run" / "final").rename(room.path / "old-final")
    assert main([*words, "--resume"]) == 0
    told = capsys.readouterr()
    assert "the plan is the one that the run" in told.out + told.err
    again = json.loads((room.path / "run" / "plan.json").read_text())
    assert (again["plan"], again["search"]) == (written["plan"], written["search"])


def test_a_run_is_predicted_by_what_its_plan_was_searched_with(room, monkeypatch):
    """A profile taken beside other work is in no file; what was told by it is what the report compares."""
    monkeypatch.setattr(auto_plan, "hardware_of_run", lambda *_, **__: (device(), True))
    values = {**values_of(room, "sft"), "max_steps": 1}
    assert main(["sft", "--config", room.config(values), "plan=auto", "plan.auto.devices=1"]) == 0
    written = json.loads((room.path / "run" / "plan.json").read_text())
    assert written["hardware"]["name"] == "imaginary"
    assert written["hardware_is_measured"] is True
    assert written["search"]["bound_s"] <= 1.001 * written["predicted"]["step_s"]


def test_a_plan_that_cannot_fit_is_refused_with_what_would(room, hardware, capsys):
    words = ["grpo", "--config", room.config(values_of(room, "grpo")), "--plan", "auto", *AUTO]
    assert main([*words, hardware(memory=2e5)]) == 2
    said = capsys.readouterr().err
    assert "nothing fits" in said
    assert "what would fit: " in said
    assert not (room.path / "run").exists()


@pytest.mark.parametrize("wrong", ["data.dataset_name", "actor.model_name_or_path"])
def test_a_name_that_is_wrong_is_told_before_a_device_is_measured(room, monkeypatch, capsys, wrong):
    monkeypatch.setattr("meshift.runtime.auto_plan.hardware_of_run", None)  # a call would end in a traceback
    words = ["grpo", "--config", room.config(values_of(room, "grpo")), "--plan", "auto", f"{wrong}=/absent/one"]
    assert main(words) == 2
    assert "/absent/one" in capsys.readouterr().err


PLAN = {"actor": {"train": {"mesh": "0-1", "layout": "d1t2p1"}, "generate": {"mesh": "0-1", "layout": "d2t1p1"}}}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("wrap", [lambda plan: plan, lambda plan: {"plan": plan, "predicted": {"step_s": 1.0}}])
def test_a_plan_file_is_read_and_may_be_changed(room, capsys, suffix, wrap):
    file = room.path / f"plan.{suffix}"
    file.write_text(json.dumps(wrap(PLAN)))
    words = ["grpo", "--config", room.config(values_of(room, "grpo")), "--plan", str(file), "--dry-run"]
    assert main([*words, "plan.actor.generate.layout=d1t2p1"]) == 0
    assert "2 processes: actor.generate d1t2p1@0-1, actor.train d1t2p1@0-1" in capsys.readouterr().out


def test_micro_batches_of_a_plan_are_the_runs_and_need_no_second_process(room):
    values = {**values_of(room, "grpo"), "max_steps": 1, "plan": {"actor": {"max_tokens_per_micro_batch": 77}}}
    assert main(["grpo", "--config", room.config(values)]) == 0
    config = yaml.safe_load((room.path / "run" / "config.yaml").read_text())
    assert config["actor"]["max_tokens_per_micro_batch"] == 77
    assert not (room.path / "run" / "placements.json").exists()


def test_slots_of_a_plan_are_the_runs_and_what_is_drawn_is_the_same(room):
    """Two sequences at a time or four: numbers of a sequence's own decide what it says."""
    drawn = []
    for slots in (None, 2):
        values = {**values_of(room, "grpo"), "max_steps": 1, "overwrite_output_dir": True}
        values |= {} if slots is None else {"plan": {"actor": {"num_slots": slots}}}
        assert main(["grpo", "--config", room.config(values)]) == 0
        config = yaml.safe_load((room.path / "run" / "config.yaml").read_text())
        assert config["generation"]["num_slots"] == (slots or 64)
        rows = (room.path / "run" / "samples.jsonl").read_text().splitlines()
        drawn.append([json.loads(row)["completion"] for row in rows])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) >= 4


def test_slots_of_a_role_that_draws_nothing_are_refused(room, capsys):
    for command, role in (("ppo", "critic"), ("dpo", "actor")):
        words = [command, "--config", room.config(values_of(room, command)), "--dry-run"]
        assert main([*words, f"plan.{role}.num_slots=8"]) == 2
        assert f"`plan.{role}.num_slots` is set, but the {role} draws nothing" in capsys.readouterr().err


def test_slots_that_fit_are_chosen_before_the_launch_and_run(room, tmp_path, capfd):
    """On a device with room for the model and keys and values of a part of sixty-four completions."""
    rows = [{"prompt": "the film was"}] * 32
    values = {**values_of(room, "grpo"), "max_steps": 1}
    values["data"] = {"dataset_name": room.rows("many.jsonl", rows), "batch_size": 32, "max_prompt_length": 8}
    values["generation"] = {"num_generations": 2, "max_completion_length": 100}
    values["actor"]["max_tokens_per_micro_batch"] = 128
    file = tmp_path / "hardware.json"
    file.write_text(json.dumps(as_values(device(memory=2.1e6))))
    words = ["grpo", "--config", room.config(values), "--plan", "auto", "plan.auto.seconds=1"]
    assert main([*words, "plan.auto.devices=1", f"launch.hardware={file}"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    config = yaml.safe_load((room.path / "run" / "config.yaml").read_text())
    slots = config["plan"]["actor"]["num_slots"]
    assert 8 <= slots < 64
    assert config["generation"]["num_slots"] == slots
    assert "completions at a time, since more do not fit" in said


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_micro_batches_of_a_plan_are_those_of_the_model(room, capsys, command):
    role = "actor" if command == "sft" else "reward"
    words = [command, "--config", room.config(values_of(room, command)), "--dry-run"]
    assert main(words) == 0
    before = capsys.readouterr().out
    assert main([*words, f"plan.{role}.max_tokens_per_micro_batch=8"]) == 0
    assert capsys.readouterr().out != before  # of which `arithmetic` says how many there are


def test_micro_batches_of_a_role_that_is_only_read_are_refused(room, capsys):
    words = ["grpo", "--config", room.config(values_of(room, "grpo")), "--dry-run"]
    assert main([*words, "plan.reference.max_tokens_per_micro_batch=8"]) == 2
    assert "the reference is not trained: it is read in the actor's micro-batches" in capsys.readouterr().err


def test_micro_batches_of_a_critic_that_is_a_head_of_the_actor_are_refused(room, capsys):
    words = ["ppo", "--config", room.config(values_of(room, "ppo")), "--dry-run", "ppo.shared_trunk=true"]
    assert main([*words, "plan.critic.max_tokens_per_micro_batch=8"]) == 2
    assert "`plan.critic` is set, but the run has no such role" in capsys.readouterr().err


def test_more_processes_than_processors_are_told(room, capsys, monkeypatch):
    values = {**values_of(room, "grpo"), "plan": PLAN}
    for count in (1, 2):
        monkeypatch.setattr("meshift.runtime.this_hardware.num_devices", lambda count=count: count)
        assert main(["grpo", "--config", room.config(values), "--dry-run"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert ("1 processor here for 2 processes, which take turns" in told) == (count == 1)
        file = room.path / "plan.json"
        file.write_text(json.dumps(PLAN))
        words = ["check", "--config", room.config(values_of(room, "grpo")), "--command", "grpo"]
        assert main([*words, "--plan", str(file)]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert ("1 processor here for 2 processes, which take turns" in told) == (count == 1)


def test_no_plan_in_a_word(room, capsys):
    values = {**values_of(room, "grpo"), "plan": PLAN}
    assert main(["grpo", "--config", room.config(values), "--plan", "none", "--dry-run"]) == 0
    assert "processes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plan", "fastest"], "write `auto`, a plan, or a file of one"),
        (["--plan", "nowhere.yaml"], "there is no plan file nowhere.yaml"),
        (["--plan", "auto", "plan.actor.train.mesh=0", "plan.actor.train.layout=d1"], "places all roles, or none"),
        (["--plan", "auto", "plan.auto.devices=0"], "plan.auto.devices"),
        (["--plan", "auto", "plan.auto.device=2"], "did you mean `plan.auto.devices`?"),
        (["--plan", "auto", "launch.hardware=abacus"], "abacus"),
        (["--plan", "auto", "launch.launcher=ray"], "set `plan.auto.devices`"),
    ],
)
def test_a_plan_that_is_none_is_named_in_one_sentence(room, capsys, words, said):
    assert main(["grpo", "--config", room.config(values_of(room, "grpo")), *words, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_devices_without_work_on_several_hosts_leave_gaps():
    given = {
        "actor": {
            "train": {"mesh": "node0:0-2", "layout": "d1t3p1"},
            "generate": {"mesh": "node1:0-3", "layout": "t4"},
        },
        "reference": {"infer": {"mesh": "node0:2,node1:0", "layout": "d2"}, "offload": True},
    }
    used = {
        device
        for role in given.values()
        for kind, placement in role.items()
        if kind != "offload"
        for device in Mesh.parse(placement["mesh"]).devices
    }
    planned = SimpleNamespace(values=given, events=[SimpleNamespace(devices=used)])
    plan = auto_plan._plan_config(SimpleNamespace(plan=PPOPlan(auto={})), planned)
    assert plan.actor.train.mesh == "4-6"
    assert plan.actor.generate.mesh == "0-3", "of a whole host, as processes are started host by host"
    assert plan.reference.infer.mesh == "6,0"
    assert plan.reference.offload
    assert num_processes(placements_of(plan, {"actor": ("generate", "train"), "reference": ("infer",)})) == 7


def test_a_plan_that_the_config_forbids_is_run(room):
    values = room.values()
    values["reference"] = {"sync_ref_model": True}
    values["actor"]["lora"] = {"rank": 2}
    config = make_config(PPORunConfig, {**values, "plan": "auto"})
    allowed = PPOPlan(actor={"train": {"mesh": "0-1", "layout": "d2"}})
    assert auto_plan._with_plan(config, allowed).plan == allowed
    with pytest.raises(ConfigError, match="the reference follows whole matrices"):
        auto_plan._with_plan(config, PPOPlan(actor={"train": {"mesh": "0-1", "layout": "d2t1p1s"}}))
