"""Real processes, killed at random and at chosen moments, end with the bytes of the run that nobody killed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshift.config.loading import dump_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "parity" / "kill_and_resume.py"
STEPS = {"max_steps": 8, "num_threads": 1, "report_to": []}
# All that PPO carries from step to step: an average of the actor, the returns' statistics, the KL coefficient.
MEMORY = {
    "reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2},
    "ppo": {"num_mini_batches": 2, "value_norm": "ema", "adaptive_kl": True, "kl_target": 0.1, "kl_horizon": 20},
}
RANDOM_REWARDS = """
import random


def answered(answer, **kwargs):
    return [value + random.random() for value in answer]
"""


@pytest.fixture
def kill(tmp_path):
    """`kill(command, config, *options)`: the script's report, which must be of success."""

    def call(command, config, *options):
        file = tmp_path / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        words = [sys.executable, str(SCRIPT), "--command", command, "--config", str(file), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        sys.stdout.write(done.stdout)  # for `pytest -rP`
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def ppo(make, tmp_path, dtype):
    rewards = tmp_path / "random_rewards.py"
    rewards.write_text(RANDOM_REWARDS, encoding="utf-8")
    reward = {"functions": [{"function": f"{rewards}:answered"}]}
    return make("unused", dtype=dtype, reward=reward, **STEPS, **MEMORY)


def script():
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seconds_of_a_planned_run_would_be_differences_and_its_numbers_would_not(tmp_path):
    row = {
        "reward/mean": 1.0,
        "timing_s/rollout": 1.0,
        "start_s/rollout": 1.0,
        "perf/mfu": 1.0,
        "sync/seconds": 1.0,
        "sync/verify_seconds": 1.0,
        "sync/probe_diff_max": 1.0,
    }
    ends = {}
    for name, other in {
        "one": {},
        "slower": dict.fromkeys([*row][1:6], 2.0),
        "other": {"sync/probe_diff_max": 2.0},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({**row, **other}) + "\n", encoding="utf-8")
        (tmp_path / name / "samples.jsonl").touch()
        ends[name] = script().end_of(tmp_path / name)
    differences = script().differences
    assert differences(ends["one"], ends["slower"]) == []
    assert differences(ends["one"], ends["other"]) == ["the metrics of step 1 differ"]


def test_a_killed_ppo_run_would_end_with_other_bytes(kill, ppo_config_on_disk, tmp_path):
    assert "\n3 kills, " in kill("ppo", ppo(ppo_config_on_disk, tmp_path, "bfloat16"), "--kills", "3")


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_killed_run_on_given_rows_would_end_with_other_bytes(kill, request, command):
    config = request.getfixturevalue(f"{command}_config_on_disk")("unused", dtype="bfloat16", **STEPS)
    assert "\n2 kills, " in kill(command, config, "--kills", "2")


def test_a_run_killed_amid_writing_would_be_lost(kill, ppo_config_on_disk, tmp_path):
    config = ppo(ppo_config_on_disk, tmp_path, "float32").model_copy(update={"max_steps": 3})
    kill("ppo", config, "--at-writes", "41")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_kills_of_ppo_leave_no_trace(kill, ppo_config_on_disk, tmp_path, dtype):
    assert "\n20 kills, " in kill("ppo", ppo(ppo_config_on_disk, tmp_path, dtype), "--kills", "20")


@pytest.mark.slow
def test_a_kill_before_any_write_at_all_leaves_no_trace(kill, ppo_config_on_disk, tmp_path):
    config = ppo(ppo_config_on_disk, tmp_path, "bfloat16").model_copy(update={"max_steps": 3})
    kill("ppo", config, "--at-writes", "1")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("command", ["sft", "reward", "dpo"])
def test_kills_of_runs_on_given_rows_leave_no_trace(kill, request, command, dtype):
    config = request.getfixturevalue(f"{command}_config_on_disk")("unused", dtype=dtype, **STEPS)
    assert "\n8 kills, " in kill(command, config, "--kills", "8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections", [{"reference": MEMORY["reference"]}, {"dpo": {"precompute_ref_log_probs": True}}]
)
def test_kills_of_dpo_with_a_moving_or_a_precomputed_reference_leave_no_trace(kill, dpo_config_on_disk, sections):
    config = dpo_config_on_disk("unused", dtype="bfloat16", **STEPS, **sections)
    assert "\n8 kills, " in kill("dpo", config, "--kills", "8")
