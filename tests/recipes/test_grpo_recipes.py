"""The GRPO recipes: valid as they are, and a reward that anybody can check by hand."""

import importlib.util
from pathlib import Path

from meshift.config.loading import load_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.config.runs import PPORunConfig
from meshift.config.sections import RewardFunctionConfig
from meshift.rewards.configured import load_functions
from meshift.runtime.plans import num_processes, placements_of
from meshift.runtime.policy_run import POLICY_METHOD

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_recipe_would_name_a_key_that_is_gone_or_a_function_that_is_not_there(monkeypatch):
    config = load_config(GRPORunConfig, RECIPES / "grpo_sentiment.yaml", ["max_steps=3"])
    assert config.max_steps == 3
    monkeypatch.chdir(RECIPES.parent)
    (function,) = config.reward.functions
    assert load_functions([RewardFunctionConfig(function=function.function)])[0].name == "praise"


def test_both_methods_start_from_the_same_quickstart_models_on_as_many_completions():
    grpo = load_config(GRPORunConfig, RECIPES / "grpo_quickstart.yaml")
    ppo = load_config(PPORunConfig, RECIPES / "quickstart.yaml")
    assert grpo.actor.model_name_or_path == ppo.actor.model_name_or_path
    assert grpo.reward.model_name_or_path == ppo.reward.model_name_or_path
    assert grpo.num_sequences == ppo.num_sequences == 48
    assert grpo.generation.temperature == ppo.generation.temperature


def test_the_recipe_by_adapters_would_train_something_else():
    ours, whole = (load_config(GRPORunConfig, RECIPES / f"grpo_{name}.yaml") for name in ("lora", "sentiment"))
    assert ours.actor.lora is not None
    differs = {"actor", "output_dir"}
    assert ours.model_dump(exclude=differs) == whole.model_dump(exclude=differs)


def test_the_recipe_by_plan_would_ask_for_calls_that_grpo_does_not_make():
    config = load_config(GRPORunConfig, RECIPES / "grpo_local2.yaml")
    assert num_processes(placements_of(config.plan, POLICY_METHOD.uses(config))) == 2


def test_the_asynchronous_recipe_would_draw_and_train_on_the_same_device():
    """And it would be another task than that of the recipe beside it."""
    ours, sync = (load_config(GRPORunConfig, RECIPES / f"grpo_{name}.yaml") for name in ("async", "sentiment"))
    actor = placements_of(ours.plan, POLICY_METHOD.uses(ours))["actor"]
    assert ours.max_staleness == 1
    assert not set(actor["generate"].mesh.devices) & {*actor["train"].mesh.devices, *actor["infer"].mesh.devices}
    assert ours.grpo.importance_correction == "token"
    for section in ("data", "reward", "generation"):
        assert getattr(ours, section) == getattr(sync, section)


def test_words_of_praise_count_once_and_words_of_blame_against_them():
    spec = importlib.util.spec_from_file_location("sentiment_reward", RECIPES / "sentiment_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not set(module.PRAISE.split()) & set(module.BLAME.split())
    texts = ["A great, GREAT film: funny", "dull. worst", "goodness", "great but dull", ""]
    assert module.praise(completions=texts, prompts=[""] * 5) == [2.0, -2.0, 0.0, 0.0, 0.0]
