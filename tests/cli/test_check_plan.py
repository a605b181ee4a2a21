"""`meshift check --plan`: a plan by hand is told what is wrong with it, or what each call takes."""

import json

import pytest

from meshift.cli.main import main
from meshift.planner.hardware import as_values, find_hardware

SIZES = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
RAW = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 32, **SIZES}
RUN = """
output_dir: runs/x
dtype: bfloat16
data: {{dataset_name: x.jsonl, batch_size: 256, max_prompt_length: 256}}
actor: {{model_name_or_path: {model}}}
reward: {{model_name_or_path: {model}}}
generation: {{max_completion_length: 256}}
ppo: {{num_mini_batches: 4}}
"""
GOOD = {
    "actor": {"train": {"mesh": "0-3", "layout": "d2t2p1"}, "generate": {"mesh": "0-3", "layout": "d4t1p1"}},
    "critic": {"train": {"mesh": "4-7", "layout": "d4t1p1s"}},
    "reference": {"infer": {"mesh": "4-7", "layout": "d4t1p1"}},
    "reward": {"infer": {"mesh": "4-5", "layout": "d2t1p1"}},
}


@pytest.fixture
def check(tmp_path, capsys):
    """`check(plan, *words)` -> exit code, what was printed, and the closing sentence."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    run = tmp_path / "ppo.yaml"
    run.write_text(RUN.format(model=folder))

    def checked(plan, *words):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(plan))
        code = main(["check", "--config", str(run), "--plan", str(file), *words])
        return code, *capsys.readouterr()

    return checked


def changed(role, kind, mesh, layout):
    return {**GOOD, role: {**GOOD[role], kind: {"mesh": mesh, "layout": layout}}}


def test_a_plan_that_can_run_has_the_seconds_and_memory_of_each_call(check):
    code, out, err = check({"plan": GOOD}, "--hardware", "h100")
    assert (code, err) == (0, "")
    assert "a plan that can run" in " ".join(out.split())
    rows = {words[0]: words for line in out.splitlines() if (words := line.split())}
    assert rows["rollout"][1:3] == ["d4t1p1", "0-3"]
    assert rows["train_critic"][1:3] == ["d4t1p1s", "4-7"]
    assert float(rows["values"][5]) > 0
    assert float(rows["train_actor"][4]) > float(rows["values"][4])


@pytest.mark.parametrize(
    ("plan", "words", "said"),
    [
        (changed("actor", "train", "0,1,1,2", "d2t2p1"), [], "names the device 1 twice"),
        (changed("actor", "train", "0-2", "d2t2p1"), [], "`plan.actor.train`: "),
        (changed("actor", "train", "0-2", "d3t1q1"), [], "d3t1q1"),
        (changed("actor", "train", "0-63", "d1t64p1"), [], "`plan.actor.train`: "),
        (changed("critic", "train", "0-31", "d1t1p32"), [], "`plan.critic.train`: "),
        (changed("critic", "train", "5-8", "d4t1p1"), ["--devices", "8"], "uses 9 devices, and there are 8"),
        (changed("critic", "train", "9-10", "d2t1p1"), [], "no placement of `plan` uses the device 8"),
        (changed("actor", "train", "node0:0-9", "d10t1p1"), ["--per-host", "8"], "name"),
        ({"writer": {"train": {"mesh": "0", "layout": "d1"}}}, [], "unknown key `plan.writer`"),
        (changed("reference", "train", "0", "d1"), [], "`plan.reference.train` is set"),
        ("auto", [], "must hold roles"),
    ],
)
def test_what_a_plan_cannot_be_is_told(check, plan, words, said):
    code, out, err = check({"plan": plan}, "--hardware", "h100", *words)
    assert code == 2
    assert said in " ".join((out + err).split())


def test_all_placements_that_cannot_be_read_are_listed(check):
    plan = {**changed("actor", "train", "0,0", "d2"), "reference": {"infer": {"mesh": "0-2", "layout": "d2"}}}
    code, out, _ = check(plan)
    assert code == 2
    assert "2 problems" in out
    assert "`plan.actor.train`" in out
    assert "`plan.reference.infer`" in out


ALONE = {role: {kind: {"mesh": "0-1", "layout": "d2t1p1"} for kind in kinds} for role, kinds in GOOD.items()}


def test_memory_that_is_short_is_told_with_what_would_fit(check, tmp_path):
    words = (
        "--hardware",
        "a100",
        "dtype=float32",
        "actor.max_tokens_per_micro_batch=65536",
        "ppo.num_mini_batches=1",
    )
    code, out, err = check(ALONE, *words)
    assert code == 2
    assert "`train_actor` (actor.train) needs " in out
    assert "GB too much" in out
    assert out.count("\n  - ") == int(out.split(": ")[1].split()[0]), out  # advice is no problem
    assert "it would fit with" in out
    assert "cannot be run" in err
    listed = next(line for line in out.splitlines() if "it would fit with" in line)
    if "data ranks that share state out" in listed:  # and so it does
        shared = {**ALONE, **{r: {"train": {"mesh": "0-1", "layout": "d2t1p1s"}} for r in ("actor", "critic")}}
        shared["actor"]["generate"] = {"mesh": "0-1", "layout": "d2t1p1"}
        assert check(shared, *words)[0] == 0


def test_the_hardware_is_the_one_that_the_file_was_predicted_for(check):

    told = as_values(find_hardware("b200"))
    code, out, _ = check({"plan": GOOD, "hardware": told})
    assert code == 0
    assert "on b200, predicted" in " ".join(out.split())


def test_devices_beyond_a_host_are_on_the_next_and_farther(check):
    far = {**GOOD, "actor": {"train": {"mesh": "0-3", "layout": "d1t4p1"}}}
    near = check(far, "--hardware", "h100")[1]
    apart = check(far, "--hardware", "h100", "--per-host", "1")[1]
    assert "node1:0" in apart
    assert "node" not in near


@pytest.mark.parametrize("text", ["", '{"plan": {},}', "plan: {}"])
def test_a_plan_file_that_is_no_json_would_be_a_traceback(check, tmp_path, capsys, text):
    check(GOOD)
    (tmp_path / "plan.json").write_text(text)
    words = ["check", "--config", str(tmp_path / "ppo.yaml"), "--plan", str(tmp_path / "plan.json")]
    assert main(words) == 2
    assert "plan.json is not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("assumed", "said"),
    [
        ([1], "must hold what `meshift plan` wrote: [1]"),
        ({"prompt_tokens": -3}, "`assumed.prompt_tokens` of"),
        ({"devices": "many"}, "`assumed.devices` of"),
    ],
)
def test_an_assumption_that_cannot_be_would_be_taken(check, assumed, said):
    code, _, err = check({"plan": GOOD, "assumed": assumed}, "--hardware", "h100")
    assert code == 2
    assert said in err


def test_a_plan_for_more_devices_than_its_file_says_would_pass(check):
    told = {"plan": GOOD, "assumed": {"devices": 4, "hardware": "h100"}}
    assert "the plan uses 8 devices, and there are 4" in check(told)[1]
    assert check(told, "--devices", "8")[0] == 0
