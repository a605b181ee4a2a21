"""`meshift grpo` with programs as completions: their tests run in the sandbox, and the policy learns to pass."""

import pytest

from meshift.config.loading import make_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.errors import ConfigError
from meshift.runtime.observer import SilentObserver
from meshift.runtime.policy_run import check_policy, run_policy

DIGITS = tuple("0123456789")
ROW = {
    "prompt": "7",
    "opening": "def f(x):\n    return ",
    "entry_point": "f",
    "test": "def check(candidate):\n    for x in range(3):\n        assert candidate(x) == 3",
}


@pytest.fixture
def make_run(make_folder, write_jsonl, tmp_path):
    """`make_run(row, **kwargs of unit_tests)`: a policy that completes a function by one digit."""

    def make(row=ROW, **kwargs):
        rows = write_jsonl(tmp_path / f"{len(row)}.jsonl", [row | {"prompt": str(i)} for i in range(4)])
        function = {"function": "unit_tests", "kwargs": {"num_workers": 2} | kwargs}
        return make_config(
            GRPORunConfig,
            {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 12,
                "dtype": "float32",
                "report_to": [],
                "data": {"dataset_name": str(rows), "batch_size": 2},
                "actor": {"model_name_or_path": str(make_folder(words=DIGITS)), "learning_rate": 3e-2},
                "reward": {"functions": [function]},
                "generation": {"max_completion_length": 1, "num_generations": 8},
                "grpo": {"num_mini_batches": 1, "kl_coef": 0.0},
            },
        )

    return make


def test_a_policy_learns_to_write_the_program_that_passes(make_run, read_lines):
    config = make_run()
    result = run_policy(config, SilentObserver())
    rows = read_lines(result.output_dir / "metrics.jsonl")
    solved = [row["reward/unit_tests/solved"] for row in rows]
    assert sum(solved[:2]) / 2 < 0.4, "a random policy writes one of ten digits, or the end"
    assert sum(solved[-2:]) / 2 > 0.8
    assert [row["reward/unit_tests"] for row in rows] == solved
    for row in rows:
        assert 0 < row["perf/time_per_reward/unit_tests"] <= row["timing_s/reward_functions"]
    samples = read_lines(result.output_dir / "samples.jsonl")
    assert {s["reward"] for s in samples if s["completion"].strip() != "3" and "fixed" not in s} <= {0.0}


def test_a_dry_run_says_what_the_data_lacks(make_run):
    said = dict(check_policy(make_run()))["rewards"]
    assert said.startswith("1 x unit_tests (in ")
    assert said.endswith(", namespaces, privileges, limits, landlock, seccomp)")
    with pytest.raises(
        ConfigError, match=r"unit_tests finds tests in none of the data's columns \(solution\); it"
    ):
        check_policy(make_run({"prompt": "7", "solution": "3"}))


def test_keys_of_unit_tests_are_checked(make_run):
    with pytest.raises(ConfigError, match="did you mean `timeout_s`"):
        check_policy(make_run(timeouts=1))
    with pytest.raises(ConfigError, match="`credit` in the kwargs of reward function unit_tests"):
        check_policy(make_run(credit="some"))
