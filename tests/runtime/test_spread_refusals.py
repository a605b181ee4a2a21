"""What a plan cannot be, of any method, is one sentence; the calls that it may place are those of the graph."""

import json

import pytest
from spread_cases import CASES, POLICY, Case, placed, run

from meshift.cli.main import main
from meshift.config.loading import dump_config
from meshift.config.runs import DPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.errors import ConfigError, InputError
from meshift.runtime.dpo_run import check_dpo
from meshift.runtime.policy_run import check_policy
from meshift.runtime.reward_run import check_reward
from meshift.runtime.sft_run import check_sft
from meshift.runtime.spread_run import METHODS

CHECKS = {DPORunConfig: check_dpo, SFTRunConfig: check_sft, RewardRunConfig: check_reward}
USES = {
    "grpo": {"actor": ("generate", "train"), "reference": ("infer",), "reward": ("infer",)},
    "dapo": {"actor": ("generate", "train"), "reward": ("infer",)},
    "gspo": {"actor": ("generate", "infer", "train"), "reward": ("infer",)},
    "remax": {"actor": ("generate", "train"), "reference": ("infer",), "reward": ("infer",)},
    "dpo": {"actor": ("infer", "train"), "reference": ("infer",)},
    "dpo-read-once": {"actor": ("infer", "train"), "reference": ("infer",)},
    "sft": {"actor": ("infer", "train")},
    "reward": {"reward": ("infer", "train")},
}
REFUSALS = {
    "a reference that nobody reads": (
        Case(POLICY["grpo"], {"reference": placed(infer="d1@1")}, {"grpo": {"kl_coef": 0.0}}),
        "`plan.reference` is set, but the run has no such role",
    ),
    "log-probs that are not read again": (
        Case(POLICY["grpo"], {"actor": placed(train="d1@1", infer="d1@0")}),
        "`plan.actor.infer` is set, but the actor has no such call",
    ),
    "no place to train": (
        Case(POLICY["gspo"], {"actor": placed(generate="d1@1", infer="d1@0")}, {"gspo": {"num_mini_batches": 2}}),
        "`plan.actor` does not say where its `train` calls run; give it `train` too",
    ),
    "nothing to generate": (
        Case(SFTRunConfig, {"actor": placed(generate="d1@1", train="d1@0")}),
        "`plan.actor.generate` is set, but the actor has no such call",
    ),
    "a gap": (Case(RewardRunConfig, {"reward": placed(train="d1@2")}), "uses the device 1; number the devices"),
    "stages": (
        Case(DPORunConfig, {"actor": placed(train="p3@0-2")}),
        r"`plan\.actor\.train`: The layout d1t1p3 has more pipeline stages than the model has",
    ),
    "layers": (
        Case(
            RewardRunConfig,
            {"reward": placed(train="d1@1", infer="d1@0")},
            {"model": {"num_frozen_layers": 9}},
        ),
        r"`model\.num_frozen_layers` = 9, but the model .* has 2 layers",
    ),
    "parts": (
        Case(RewardRunConfig, {"reward": placed(train="t9@0-8")}),
        r"`plan\.reward\.train`: \d+ \w+.* cannot be cut into 9 parts",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_a_plan_would_place_calls_that_are_not_made_or_forget_some(make_case, tmp_path, name):
    config = make_case(CASES[name], tmp_path)
    assert METHODS[type(config)].uses(config) == USES[name]


def test_an_actor_that_has_no_rows_to_evaluate_would_have_to_read(make_case, tmp_path, spread_files):
    data = {"dataset_name": spread_files["pairs"][0]}
    config = make_case(CASES["reward"], tmp_path, data=data, eval_steps=None)
    assert METHODS[type(config)].uses(config) == {"reward": ("train",)}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_plan_cannot_be_would_be_found_out_late(make_case, tmp_path, name):
    case, sentence = REFUSALS[name]
    config = make_case(case, tmp_path / "run", plan=case.plan)
    for start in (CHECKS.get(case.schema, check_policy), run):
        with pytest.raises(ConfigError, match=sentence):
            start(config)
    assert not (tmp_path / "run").exists()


def test_a_method_would_take_a_plan_for_a_role_of_another(make_case, tmp_path):
    with pytest.raises(InputError, match=r"unknown key `plan\.critic`"):
        make_case(CASES["grpo"], tmp_path, plan={"critic": placed(train="d1@0")})


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_bad_plan_would_end_with_a_traceback(make_case, tmp_path, capsys, words):
    case, sentence = REFUSALS["nothing to generate"]
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(make_case(case, tmp_path / "run", plan=case.plan)), encoding="utf-8")
    assert main(["sft", "--config", str(file), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line


def test_a_dry_run_would_not_show_the_plan_of_another_method(make_case, tmp_path):
    case = CASES["gspo"]
    rows = dict(check_policy(make_case(case, tmp_path / "run", plan=case.plan)))
    placements = "actor.generate d2t1p1@0-1, actor.infer d1t1p1@2, actor.train d1t2p1@1-2, reward.infer d1t1p1@0"
    assert rows["plan"] == f"3 processes: {placements}"


def test_no_plan_would_still_be_one(make_case, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(make_case(CASES["sft"], tmp_path / "run", plan=CASES["sft"].plan, max_steps=1)))
    assert main(["sft", "--config", str(file), "plan=null"]) == 0
    assert not (tmp_path / "run" / "placements.json").exists()
    assert "start_s/train_actor" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
