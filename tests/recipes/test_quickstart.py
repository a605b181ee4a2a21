"""The quickstart and its recipes: `make quickstart` is the first thing that anybody runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from meshift.config.loading import load_config
from meshift.config.runs import PPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.evaluation.completions import Completions

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", RECIPES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def evaluation(module, **figures):
    completions = Completions(prompts=["A [b]film"], texts=["[/b] good one"], batch=None)
    return module.Evaluation(**figures, completions=completions)


def test_a_recipe_would_name_a_key_that_is_gone():
    load_config(SFTRunConfig, RECIPES / "quickstart_sft.yaml")
    load_config(RewardRunConfig, RECIPES / "quickstart_reward.yaml")
    load_config(PPORunConfig, RECIPES / "quickstart.yaml")


def test_the_seed_or_the_folder_would_not_reach_every_run(quickstart, tmp_path):
    options = quickstart.parse(["--seed", "7", "--output", str(tmp_path), "--ppo", "max_steps=2"])
    chain = quickstart.configs(options)
    sft, reward, ppo = chain.sft, chain.reward, chain.ppo
    assert (sft.seed, reward.seed, ppo.seed, ppo.max_steps) == (7, 7, 7, 2)
    assert Path(ppo.actor.model_name_or_path) == Path(sft.output_dir) / "final"
    assert Path(ppo.reward.model_name_or_path) == Path(reward.output_dir) / "final"
    assert {Path(run.output_dir).parent for run in (sft, reward, ppo)} == {tmp_path}


def test_the_summary_would_lack_a_figure_or_mix_before_and_after(quickstart, tmp_path, capsys):
    before = evaluation(quickstart, reward=1.0, judge=0.1, kl=0.0, length=20.0, distinct2=0.9)
    after = evaluation(quickstart, reward=3.0, judge=0.5, kl=12.0, length=19.0, distinct2=0.8)
    summary = quickstart.summarise(before, after, 0.8, {"prepare": 1.5, "ppo": 2.0}, seed=3)
    path = quickstart.write_results(tmp_path, summary, before, after)
    written = json.loads(path.read_text())
    assert written["judge"] == {"before": 0.1, "after": 0.5}
    assert written["kl"] == {"before": 0.0, "after": 12.0}
    assert written["reward"] == {"before": 1.0, "after": 3.0}
    assert written["distinct2"] == {"before": 0.9, "after": 0.8}
    assert written["seconds"] == {"prepare": 1.5, "ppo": 2.0, "total": 3.5}
    assert written["reward_model_accuracy"] == 0.8
    assert 0.01 < written["peak_memory_gb"] < 64
    base = evaluation(quickstart, reward=0.9, judge=0.2345, kl=0.0, length=20.0, distinct2=0.9)
    quickstart.show(quickstart.Console(width=100), summary, (base, before, after))
    shown = capsys.readouterr().out
    assert "0.234" in shown
    assert "0.500" in shown
    assert "[/b] good one" in shown, "brackets in a text are no markup"


MESHIFTS = "Meshift's (1a2b)"


@pytest.mark.parametrize(
    ("dtype", "fast", "capability", "multiplies", "said"),
    [
        ("float32", False, "AVX512", MESHIFTS, "float32 on the CPU, by torch's kernels; about 7 minutes on two"),
        ("float32", False, "AVX2", "torch's", "float32 on the CPU, by torch's kernels"),
        ("bfloat16", True, "AVX512", MESHIFTS, f"bfloat16 on the CPU, by {MESHIFTS} kernels; about 5 minutes on"),
        ("bfloat16", False, "AVX512", MESHIFTS, f"bfloat16 on the CPU, by {MESHIFTS} kernels; about 8 minutes on"),
        (
            "bfloat16",
            True,
            "AVX512",
            "torch's",
            "bfloat16 on the CPU, by torch's kernels; about 10 minutes on two",
        ),
        ("bfloat16", False, "AVX512", "torch's", "bfloat16 on the CPU, by torch's kernels"),
        (
            "bfloat16",
            True,
            "AVX512",
            f"{MESHIFTS}, products by torch",
            f"by {MESHIFTS}, products by torch kernels",
        ),
    ],
)
def test_minutes_would_be_promised_that_nobody_has_measured(
    quickstart, monkeypatch, dtype, fast, capability, multiplies, said
):
    monkeypatch.setattr(quickstart.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(quickstart.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(quickstart, "fast_bfloat16", lambda: fast)
    monkeypatch.setattr(quickstart, "who_multiplies", lambda: multiplies)
    told = quickstart.how_it_computes(getattr(quickstart.torch, dtype))
    assert said in told
    assert ("minutes" in told) == ("minutes" in said)


def test_a_wrong_override_would_end_in_a_traceback(quickstart, tmp_path, capsys):
    assert quickstart.main(["--output", str(tmp_path), "--ppo", "ppo.kl_coeff=1"]) == 2
    assert "did you mean `ppo.kl_coef`?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_job_would_not_raise_the_judge_or_would_collapse(quickstart, tmp_path):
    assert quickstart.main(["--output", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["judge"]["after"] - summary["judge"]["before"] >= 0.25
    assert summary["reward"]["after"] > summary["reward"]["before"]
    assert 0 < summary["kl"]["after"] < 20
    assert summary["distinct2"]["after"] >= 0.7 * summary["distinct2"]["before"]
    assert summary["reward_model_accuracy"] > 0.7
    assert summary["peak_memory_gb"] < 8
