"""`meshift ppo` with reward functions of three flavours at once, one of which hangs: the run goes on, or stops."""

import pytest

from meshift.errors import ConfigError, RewardError
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import check_ppo, run_ppo

FILE = """
import asyncio

import torch


async def brief(prompts, completions, completion_ids, log_metric, trainer_state, **columns):
    await asyncio.sleep(0)
    log_metric("step", trainer_state.global_step)
    return [None if prompt == "a story" else -float(len(ids)) for prompt, ids in zip(prompts, completion_ids)]


def reward_func(queries, prompts, labels):
    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts))
    rewards = torch.tensor([float(label) for label in labels])
    return {"rewards": 2 * rewards, "scores": rewards, "extra_logs": {"labels": rewards}}
"""
# In a file without torch: it is loaded again after every timeout.
VERL = """
import time


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "HANG":
        time.sleep(600)
    return {"score": float(ground_truth), "acc": isinstance(solution_str, str)}
"""
PROMPTS = ("the film was", "a story", "it was", "the")


@pytest.fixture
def make_config(ppo_config_on_disk, write_jsonl, tmp_path):
    """`make_config(hanging, **keys)`: four prompts, of which the third may hang; keys are compute_score's."""

    def make(hanging, **keys):
        rows = [
            {
                "prompt": text,
                "data_source": "HANG" if hanging and i == 2 else "films",
                "reward_model": {"ground_truth": str(i)},
            }
            for i, text in enumerate(PROMPTS)
        ]
        (tmp_path / "two.py").write_text(FILE, encoding="utf-8")
        (tmp_path / "verl_score.py").write_text(VERL, encoding="utf-8")
        functions = [
            {"function": f"{tmp_path}/two.py:brief", "weight": 0.5},
            {"function": f"{tmp_path}/verl_score.py:compute_score", "weight": 100.0} | keys,
            {"function": f"{tmp_path}/two.py:reward_func"},
        ]
        return ppo_config_on_disk(
            tmp_path / "run",
            data={"dataset_name": write_jsonl(tmp_path / "prompts.jsonl", rows), "batch_size": 4},
            reward={"functions": functions},
            generation={"max_completion_length": 3, "num_generations": 2},
        )

    return make


def test_three_flavours_add_up_and_a_dry_run_names_them(make_config, read_lines):
    config = make_config(hanging=False)
    assert dict(check_ppo(config))["rewards"] == (
        "0.5 x brief (TRL) + 100 x compute_score (verl) + 1 x reward_func (OpenRLHF)"
    )
    run_ppo(config, SilentObserver())
    rows = read_lines(config_path(config) / "metrics.jsonl")
    for step, row in enumerate(rows):
        assert row["reward/compute_score"] == 1.5, "the mean of 0 to 3"
        assert row["reward/compute_score/acc"] == 1.0
        assert (row["reward/reward_func"], row["reward/reward_func/scores"]) == (3.0, 1.5)
        assert row["reward/reward_func/labels"] == 1.5
        assert row["reward/brief/step"] == step
        brief = 0.75 * row["reward/brief"]  # of three prompts in four
        assert row["reward/mean"] == pytest.approx(0.5 * brief + 100 * 1.5 + 3.0, rel=1e-6)
    assert len(rows) == 2


def config_path(config):
    from pathlib import Path

    return Path(config.output_dir)


def test_a_run_goes_on_without_the_samples_that_a_function_hangs_on(make_config, read_lines):
    config = make_config(hanging=True, timeout_s=1.0, on_error="skip")
    run_ppo(config, SilentObserver())
    rows = read_lines(config_path(config) / "metrics.jsonl")
    assert [row["reward/compute_score/num_timeouts"] for row in rows] == [2, 2]
    assert [row["reward/compute_score"] for row in rows] == pytest.approx([4 / 3, 4 / 3])
    assert (config_path(config) / "final" / "model.safetensors").is_file()


def test_a_run_stops_at_a_hanging_function_and_names_the_prompts_line(make_config):
    config = make_config(hanging=True, timeout_s=1.0)
    with pytest.raises(
        RewardError, match=r"compute_score gave no .*= 1 on sample \d \(.*prompts\.jsonl:3\), compl"
    ):
        run_ppo(config, SilentObserver())


def test_a_dry_run_finds_what_a_function_cannot_be_given(make_config):
    with pytest.raises(ConfigError, match="compute_score takes no parameter 'tolerance'"):
        check_ppo(make_config(hanging=False, kwargs={"tolerance": 1}))
