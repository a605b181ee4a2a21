"""The recipes of methods beside GRPO and the quickstart's: valid, and of the calls they should make."""

from pathlib import Path

import pytest

from meshift.config.loading import load_config
from meshift.config.policy_runs import OnlineDPORunConfig, RAFTRunConfig
from meshift.config.runs import KTORunConfig, ORPORunConfig, PPORunConfig
from meshift.runtime.policy_run import METHODS as CRITIC_FREE
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
    "ppo_shared_trunk": (PPORunConfig, {"actor": ("generate", "infer", "train"), "reference": ("infer",)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_recipe_would_name_a_key_that_is_gone_or_make_other_calls(name):
    schema, calls = CALLS[name]
    config = load_config(schema, RECIPES / f"{name}.yaml", ["max_steps=3"])
    assert config.max_steps == 3
    assert METHODS[schema].uses(config) == calls


@pytest.mark.parametrize("schema", CRITIC_FREE, ids=lambda schema: schema.SECTION)
def test_the_recipe_of_all_methods_without_a_critic_would_not_be_of_one(schema):
    config = load_config(schema, RECIPES / "methods_sentiment.yaml")
    assert METHODS[schema].uses(config)["actor"][0] == "generate"
    assert config.objective == type(config.objective)(), "each with the values of its paper"
