"""The recipes for dialogue: each is valid once the data is named, and each starts where one before it ended."""

from pathlib import Path

import pytest

from meshift.config.loading import load_config
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMAS = {"sft": SFTRunConfig, "reward": RewardRunConfig, "dpo": DPORunConfig, "ppo": PPORunConfig}


def load(name, *overrides):
    words = ("data.dataset_name=hh.jsonl[:1300]", *overrides)
    return load_config(SCHEMAS[name], RECIPES / f"hh_{name}.yaml", words)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_dialogue_recipe_needs_nothing_but_the_users_data(name):
    config = load(name)
    assert config.data.dataset_name == "hh.jsonl[:1300]"
    assert config.output_dir == f"runs/hh/{name}"
    assert config.data.apply_chat_template, "all four must see dialogues in the same words"
    if name != "ppo":
        measured = load(name, "data.eval_dataset_name=hh.jsonl[1300:]", "eval_steps=20")
        assert measured.data.eval_dataset_name == "hh.jsonl[1300:]"
    with pytest.raises(ConfigError, match=r"`data\.dataset_name` is needed"):
        load_config(SCHEMAS[name], RECIPES / f"hh_{name}.yaml")


def test_each_stage_starts_from_what_an_earlier_one_wrote():
    fine_tuned, scored = (f"{load(name).output_dir}/final" for name in ("sft", "reward"))
    assert load("reward").model.model_name_or_path == fine_tuned
    assert load("dpo").actor.model_name_or_path == fine_tuned
    ppo = load("ppo")
    assert ppo.actor.model_name_or_path == fine_tuned
    assert ppo.reward.model_name_or_path == scored
