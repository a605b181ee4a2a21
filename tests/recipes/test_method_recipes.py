"""The recipes of online DPO, RAFT, KTO, ORPO and PPO with a cost: valid, and of the calls they should make."""

from pathlib import Path

import pytest

from meshift.config.loading import load_config
from meshift.config.policy_runs import OnlineDPORunConfig, RAFTRunConfig
from meshift.config.runs import KTORunConfig, ORPORunConfig, PPORunConfig
from meshift.runtime.spread_run import METHODS

RECIPES = Path(__file__).parents[2] / "recipes"
CALLS = {
    "online_dpo_sentiment": (
        OnlineDPORunConfig,
        {"actor": ("generate", "train"), "reference": ("infer",)},
    ),
    "raft_sentiment": (RAFTRunConfig, {"actor": ("generate", "train")}),
    "kto_sentiment": (KTORunConfig, {"actor": ("infer", "train"), "reference": ("infer",)}),
    "orpo_sentiment": (ORPORunConfig, {"actor": ("infer", "train")}),
    "ppo_cost_sentiment": (
        PPORunConfig,
        {
            "actor": ("generate", "train"),
            "critic": ("infer", "train"),
            "reference": ("infer",),
            "cost_critic": ("infer", "train"),
        },
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_recipe_would_name_a_key_that_is_gone_or_make_other_calls(name):
    schema, calls = CALLS[name]
    config = load_config(schema, RECIPES / f"{name}.yaml", ["max_steps=3"])
    assert config.max_steps == 3
    assert METHODS[schema].uses(config) == calls
