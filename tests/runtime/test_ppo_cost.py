"""`meshift ppo` with a cost model and a cost function: its folder, its checks, and resuming bit for bit."""

import pytest
from broken_runs import KEPT, Notes, changed, end_of
from transformers import AutoModelForSequenceClassification

from meshift.errors import ModelError
from meshift.runtime.memory import held_models
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import check_ppo, run_ppo


@pytest.fixture
def with_cost(ppo_config_on_disk, reward_folder, rewards_file, tmp_path):
    def make(name="run", cost=None, **sections):
        given = {
            "model_name_or_path": str(reward_folder),
            "functions": [{"function": f"{rewards_file}:short", "weight": -1.0}],
            "limit": 1.0,
            "multiplier_learning_rate": 0.01,
        }
        critic = {"learning_rate": 1e-3}
        return ppo_config_on_disk(tmp_path / name, cost=given | (cost or {}), cost_critic=critic, **sections)

    return make


def test_a_resumed_run_goes_on_with_its_multiplier_to_the_last_bit(with_cost):
    given = {"dtype": "bfloat16", **KEPT, "max_steps": 4}
    whole = run_ppo(with_cost("whole", **given), SilentObserver())
    config = with_cost("run", **given)
    with pytest.raises(KeyboardInterrupt):
        run_ppo(config, Notes(3))
    resumed = run_ppo(changed(config, resume=True), SilentObserver())
    assert end_of(resumed.output_dir) == end_of(whole.output_dir)
    weights = [row["cost/multiplier"] for row in end_of(whole.output_dir)[1]]
    assert len(set(weights)) == 4, "the multiplier must move in every step"


def test_a_run_leaves_the_critic_of_costs_and_says_what_they_were(with_cost, read_lines):
    result = run_ppo(with_cost(), SilentObserver())
    AutoModelForSequenceClassification.from_pretrained(result.output_dir / "final_cost_critic", num_labels=1)
    for row in read_lines(result.output_dir / "metrics.jsonl"):
        assert row["cost/short"] == pytest.approx(-row["response_length/mean"])
        assert {"cost/mean", "cost_critic/vf_loss", "cost_critic/lr", "timing_s/cost"} <= row.keys()
        assert row["reward/short"] == pytest.approx(row["cost/short"]), "the same function, as a reward"


def test_a_dry_run_counts_the_roles_of_a_cost(with_cost, reward_folder):
    config = with_cost()
    rows = dict(check_ppo(config))
    assert rows["costs"] == "-1 x short (TRL)"
    assert rows["cost model"] == rows["cost_critic model"] == str(reward_folder)
    held = {one.role: one.head for one in held_models(config)}
    assert held["cost_critic"] == "value"
    assert held["cost"] == "reward"


def test_a_language_model_is_no_cost_model(with_cost, actor_folder):
    with pytest.raises(ModelError, match=r"the cost model .* holds no score"):
        check_ppo(with_cost(cost={"model_name_or_path": str(actor_folder)}))
