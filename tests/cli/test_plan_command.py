"""`meshift plan` from a config and a config.json: a table, a file that a run reads, or what is short."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from meshift.cli.main import main
from meshift.cli.plan_request import Asked, taken_lengths
from meshift.config.loading import load_config
from meshift.config.plan import PPOPlan
from meshift.config.runs import PPORunConfig
from meshift.layout.layout import Placement
from meshift.layout.mesh import Mesh
from meshift.planner.hardware import as_values, find_hardware
from meshift.planner.strategies import STRATEGIES

SIZES = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
RAW = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 32, **SIZES}
RUN = """
output_dir: runs/x
data: {{dataset_name: x.jsonl, batch_size: 256, max_prompt_length: 256}}
actor: {{model_name_or_path: {model}}}
reward: {{model_name_or_path: {model}}}
generation: {{max_completion_length: 256}}
ppo: {{num_mini_batches: 4}}
"""


@pytest.fixture
def run_file(tmp_path):
    """A PPO run of a model of which there is a config.json alone."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    file = tmp_path / "ppo.yaml"
    file.write_text(RUN.format(model=folder))
    return file


def plan(file, *words):
    return main(["plan", "--config", str(file), "--seconds", "2", *words])


def test_a_plan_is_shown_and_written_as_a_run_reads_it(run_file, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    assert plan(run_file, "--devices", "4", "--hardware", "a100", "--explain", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for word in ("rollout", "train_critic", "Megatron heuristic", "times the plan's", "(actor.generate) runs as"):
        assert word in shown
    read = PPOPlan.model_validate(yaml.safe_load(out.read_text())["plan"])
    assert set(read.roles) == {"actor", "critic", "reference", "reward"}
    for role in read.roles.values():
        for given in role.placements.values():
            assert Placement.parse(given.mesh, given.layout).layout.num_ranks <= 4


def test_what_is_predicted_is_written_too(run_file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert plan(run_file, "--devices", "2", "--out", str(out)) == 0
    written = json.loads(out.read_text())
    assert written["predicted"]["bound_s"] <= written["predicted"]["step_s"] * 1.05
    assert {event["name"] for event in written["predicted"]["events"]} >= {"rollout", "train_actor"}
    assert "step" in capsys.readouterr().out


def test_a_plan_is_a_page_to_look_at(run_file, tmp_path):
    out = tmp_path / "plan.html"
    assert plan(run_file, "--devices", "4", "--out", str(out)) == 0
    page = out.read_text()
    assert "device 3" in page
    assert "<title>train_critic: " in page
    assert "(actor.generate) runs as" in page
    by_hand = page[page.index('id="by-hand"') : page.index('id="reasons"')]
    assert all(f">{name}</th>" in by_hand for name in STRATEGIES)
    told = ("times the plan", "as long as the plan", "not possible")
    assert sum(map(by_hand.count, told)) == len(STRATEGIES)
    assert "1.00 times" not in page


def test_one_device_is_no_range_and_a_plan_as_long_is_not_a_number_of_times_as_long(run_file, tmp_path, capsys):
    out = tmp_path / "plan.html"
    assert plan(run_file, "--devices", "1", "--hardware", "h200", "--explain", "--out", str(out)) == 0
    told = capsys.readouterr().out
    row = next(line.split() for line in told.splitlines() if line.split()[:1] == ["rollout"])
    assert row[1:3] == ["d1t1p1", "0"]
    assert "0-0" not in told + out.read_text()
    assert "1.00 times" not in told + out.read_text()
    assert "as long as the plan's" in told  # one layout is the only one


def test_a_plan_is_written_in_what_its_suffix_says_or_refused_before_anything_is_planned(
    run_file, tmp_path, capsys
):
    assert plan(run_file, "--devices", "1", "--out", str(tmp_path / "plan.txt")) == 2
    assert "plan.txt: its suffix says what is written; give it one of .yaml, .yml, .json, .html" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "plan.txt").exists()


def test_more_devices_and_longer_answers_are_planned_for_comparison(run_file, capsys):
    assert plan(run_file, "--devices", "1", "--what-if", "devices=2", "--what-if", "completion=64,250") == 0
    tables = capsys.readouterr().out.split("what if: ")[1:]
    rows = [
        {w[0]: w[1:] for line in one.splitlines()[4:] if (w := re.sub(r"\S+ \(as it is\)", "now", line).split())}
        for one in tables
    ]
    devices, lengths = ({value: float(row[0]) for value, row in one.items()} for one in rows)
    assert devices["2"] < devices["now"]
    assert lengths["64"] < lengths["now"] < lengths["250"]
    assert rows[0]["now"][3] == "100%"
    assert rows[0]["2"][3] == f"{devices['now'] / devices['2'] / 2:.0%}"


def test_what_if_is_a_curve_of_the_page(run_file, tmp_path):
    out = tmp_path / "plan.html"
    words = ("--what-if", "devices=2,4", "--what-if", "network=2x", "--out", str(out))
    assert plan(run_file, "--devices", "1", *words, "--simulate", "3") == 0
    page = out.read_text()
    assert "3 steps with random lengths take" in page
    assert "perfect scaling" in page
    assert page.count("<figure") == 2  # the step's chart, and no curve over a factor


def test_steps_with_random_lengths_are_played(run_file, capsys):
    assert plan(run_file, "--devices", "2", "--simulate", "5") == 0
    assert "5 steps with random lengths take " in capsys.readouterr().out


def test_hosts_have_the_names_that_are_given(run_file, tmp_path, capsys):
    out, words = tmp_path / "plan.yaml", ("--devices", "4", "--per-host", "2", "--out")
    assert plan(run_file, *words, str(out), "--hosts", "alpha,beta") == 0
    meshes = {p["mesh"] for role in yaml.safe_load(out.read_text())["plan"].values() for p in role.values()}
    assert {d.host for mesh in meshes for d in Mesh.parse(mesh).devices} == {"alpha", "beta"}
    assert plan(run_file, *words, str(out), "--hosts", "alpha") == 2
    assert "on 2 hosts" in capsys.readouterr().err


def test_a_run_that_took_longer_makes_the_next_plan_slower(run_file, tmp_path, capsys):
    """Each call of the run took three times what had been predicted."""
    out = tmp_path / "plan.json"
    assert plan(run_file, "--devices", "2", "--out", str(out)) == 0
    before = json.loads(out.read_text())
    run = tmp_path / "run"
    run.mkdir()
    for event in before["predicted"]["events"]:
        event["kind"] = "call" if " " not in event["name"] else "move"
    (run / "plan.json").write_text(json.dumps(before))
    times = {e["name"]: e["end_s"] - e["start_s"] for e in before["predicted"]["events"]}
    row = {f"timing_s/{name}": 3 * seconds for name, seconds in times.items()}
    row |= {"timing_s/reward_functions": 90.0, "timing_s/advantages": 30.0}
    row |= {"training/global_step": 1, "perf/time_per_step": 3 * before["predicted"]["step_s"]}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert plan(run_file, "--devices", "2", "--out", str(out), "--measured", str(run)) == 0
    assert "There it took 2 min 0 s a step, most of it in reward_functions" in " ".join(
        capsys.readouterr().out.split()
    )
    after = json.loads(out.read_text())["predicted"]["step_s"]
    assert after == pytest.approx(3 * before["predicted"]["step_s"], rel=0.03)
    assert plan(run_file, "--devices", "2", "--hardware", "a100", "--measured", str(run)) == 2
    assert "says nothing of the other" in capsys.readouterr().err
    (run / "plan.json").unlink()
    assert plan(run_file, "--devices", "2", "--measured", str(run)) == 2
    assert "no plan.json with a prediction" in capsys.readouterr().err


def test_what_does_not_fit_is_said_with_what_would(run_file, capsys):
    deep = RAW | {"num_hidden_layers": 120}
    (run_file.parent / "model" / "config.json").write_text(json.dumps(deep))
    assert plan(run_file, "--devices", "1", "dtype=float32") == 2
    told = capsys.readouterr()
    assert "GB too much" in told.out
    assert "what would fit" in told.out
    assert "does not fit on 1 h100" in told.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", "0"), "--devices: 0 is below 1"),
        (("--devices", "2", "--per-host", "-1"), "--per-host: -1 is below 1"),
        (("--devices", "2", "--seconds", "nan"), "--seconds: nan is no number"),
        (("--devices", "2", "--prompt-tokens", "-5"), "--prompt-tokens: -5 is not above 0"),
        (("--devices", "2", "--completion-tokens", "nan"), "--completion-tokens: nan is no number"),
        (("--devices", "2", "--completion-tokens", "257"), "the config has at most 256"),
        (("--devices", "2", "--what-if", "completion=64,5000"), "the config has at most 256"),
        (("--devices", "2", "--what-if", "prompt=300"), "the config has at most 256"),
        (("--devices", "2", "--what-if", "devices=2.7"), "2.7 is no whole number"),
        (("--devices", "2", "--what-if", "network=inf"), "inf is no number above 0"),
        (("--devices", "2", "--what-if", "batch=2"), "num_mini_batches"),
        (("--devices", "2", "--hardware", "abacus"), "none of a100"),
        (("--devices", "2", "--what-if", "weather=fine"), "write one of devices"),
        (("--devices", "2", "--command", "pp"), "trains nothing"),
        (("--devices", "2", "actor.model_name_or_path=/nowhere"), "/nowhere"),
    ],
)
def test_a_mistake_is_named_in_one_sentence(run_file, capsys, words, said):
    assert plan(run_file, *words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("memory", "80GB", "`memory` is '80GB'; write a number above 0"),
        ("memory", -1, "`memory` is -1"),
        ("memory_rate", 0, "`memory_rate` is 0"),
        ("near_delay", -1e-5, "write a number of at least 0"),
        ("per_host", 2.5, "write a whole number"),
        ("per_host", "8", "`per_host` is '8'"),
        ("compute_share", 1.5, "a part of 1"),
        ("flops", 3, "must hold the peaks of bfloat16 and float32"),
        ("flops", {"bfloat16": 1e12, "float32": True}, "`flops.float32` is True"),
        ("machine", None, "`machine` is None"),
    ],
)
def test_hardware_that_cannot_be_would_be_planned_for(run_file, tmp_path, capsys, key, value, said):
    file = tmp_path / "hardware.json"
    file.write_text(json.dumps({**as_values(find_hardware("h100")), key: value}))
    assert plan(run_file, "--devices", "2", "--hardware", str(file)) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_plan_that_is_checked_would_be_of_other_lengths_and_numbers_than_the_one_that_was_made(
    run_file, tmp_path, capsys, suffix
):
    out = tmp_path / f"plan{suffix}"
    words = ("--hardware", "h200", "--completion-tokens", "60", "--prompt-tokens", "33")
    assert plan(run_file, "--devices", "2", *words, "--out", str(out)) == 0
    made = capsys.readouterr().out
    assert main(["check", "--config", str(run_file), "--plan", str(out)]) == 0
    checked = capsys.readouterr().out
    (seconds,) = re.findall(r"([\d.]+) s a step on h200", checked)
    told = re.findall(r"^step ([\d.]+) s", made, re.MULTILINE) + re.findall(r"a step takes ([\d.]+) s", made)
    assert float(seconds) == pytest.approx(float(told[-1]), rel=0.01)
    assert f"33 tokens in the mean: as {out} says; completions of 60: as {out} says" in checked
    assert main(["check", "--config", str(run_file), "--plan", str(out), "--completion-tokens", "200"]) == 0
    assert "completions of 200: --completion-tokens" in capsys.readouterr().out


def test_a_network_that_carries_nothing_would_pass_for_one_that_makes_no_difference(run_file, capsys):
    assert plan(run_file, "--devices", "2", "--what-if", "network=2x", "--what-if", "prompt=16,200") == 0
    shown = capsys.readouterr().out
    assert "all 2 devices are on one host of 8" in shown
    lengths = shown[shown.index("what if: prompt") :]
    short, long = (float(re.findall(rf"^\s*{n}\s+([\d.]+)", lengths, re.MULTILINE)[0]) for n in (16, 200))
    assert short < long
    assert plan(run_file, "--devices", "2", "--per-host", "1", "--what-if", "network=2x") == 0
    assert "on one host" not in capsys.readouterr().out


def test_readings_would_stream_where_the_run_does_not(run_file):
    for words, streaming in (([], True), (["launch.stream=false"], False)):
        config = load_config(PPORunConfig, run_file, words)
        lengths = taken_lengths(config, 100.0, 100.0)
        hardware = find_hardware("h100")
        asked = Asked(config=config, lengths=lengths, hardware=hardware, num_devices=2, seconds=1.0)
        assert asked.plan().problem.streaming is streaming


def test_planning_needs_no_torch(run_file):
    code = "import sys; from meshift.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    words = ["plan", "--config", str(run_file), "--devices", "1", "--seconds", "1", "--command", "ppo"]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False).returncode == 0


def test_a_model_far_too_large_is_told_how_many_devices_it_takes(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    (folder / "config.json").write_text(json.dumps({**RAW, **sizes, "num_attention_heads": 64}))
    file = tmp_path / "sft.yaml"
    values = {
        "output_dir": "runs/x",
        "data": {"dataset_name": "x.jsonl"},
        "model": {"model_name_or_path": str(folder)},
    }
    file.write_text(yaml.safe_dump(values))
    words = ("--command", "sft", "--hardware", "h100")
    assert plan(file, *words, "--devices", "1") == 2
    told = capsys.readouterr().out
    count = re.search(r"what would fit: (\d+) devices instead of 1", told)
    assert count is not None, told
    assert "GB too much, even with" in told
    assert plan(file, *words, "--devices", count[1]) == 0
    assert plan(file, *words, "--devices", str(int(count[1]) // 2)) == 2
