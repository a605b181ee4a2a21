"""The configs of the critic-free methods: defaults of the papers, and what does not fit together is named."""

import pytest

from meshift.config.loading import describe_keys, make_config
from meshift.config.policy_runs import (
    CISPORunConfig,
    DAPORunConfig,
    DrGRPORunConfig,
    GRPORunConfig,
    GSPORunConfig,
    ReinforcePPRunConfig,
    ReMaxRunConfig,
    RLOORunConfig,
)
from meshift.errors import ConfigError

SCHEMAS = (
    *(GRPORunConfig, DrGRPORunConfig, DAPORunConfig, GSPORunConfig),
    *(CISPORunConfig, RLOORunConfig, ReinforcePPRunConfig, ReMaxRunConfig),
)
EACH = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.SECTION)
MINIMAL = {
    "output_dir": "unused",
    "data": {"dataset_name": "unused"},
    "actor": {"model_name_or_path": "unused"},
    "reward": {"functions": [{"function": "unused:unused"}]},
}


def make(schema, **sections):
    return make_config(schema, {**MINIMAL, **sections})


@EACH
def test_a_minimal_config_is_enough(schema):
    config = make(schema)
    assert config.policy is getattr(config, schema.SECTION)
    assert config.generation.num_generations == (1 if schema in (ReinforcePPRunConfig, ReMaxRunConfig) else 8)
    assert config.actor.learning_rate == 1e-6
    assert config.policy.recompute_logprobs == (schema in (GSPORunConfig, RLOORunConfig))


@EACH
def test_every_key_is_described(schema):
    rows = list(describe_keys(schema))
    assert f"{schema.SECTION}.kl_coef" in [key for key, _, _ in rows]
    assert not [key for key, _, description in rows if not description]


@pytest.mark.parametrize("schema", [s for s in SCHEMAS if s not in (ReinforcePPRunConfig, ReMaxRunConfig)])
def test_a_group_of_one_has_nothing_to_be_compared_with(schema):
    with pytest.raises(ConfigError, match=r"`generation.num_generations` = 1, but .* at least 2"):
        make(schema, generation={"num_generations": 1})


def test_only_the_baseline_form_of_reinforce_pp_needs_a_group():
    make(ReinforcePPRunConfig)
    with pytest.raises(ConfigError, match="at least 2"):
        make(ReinforcePPRunConfig, reinforce_pp={"baseline": "group"})
    make(ReinforcePPRunConfig, reinforce_pp={"baseline": "group"}, generation={"num_generations": 2})


@pytest.mark.parametrize(
    ("keys", "place", "estimator"),
    [
        ({}, "reward", "k1"),
        ({"baseline": "none", "kl_in": "loss"}, "loss", "k1"),
        ({"baseline": "group"}, "loss", "k2"),
        ({"baseline": "group", "kl_in": "loss"}, "loss", "k2"),
        ({"baseline": "group", "kl_in": "reward"}, "reward", "k1"),
        ({"baseline": "group", "kl_estimator": "k3"}, "loss", "k3"),
        ({"baseline": "group", "kl_in": "reward", "kl_estimator": "k3"}, "reward", "k3"),
    ],
)
def test_the_baseline_form_of_reinforce_pp_is_the_papers_where_nothing_else_is_said(keys, place, estimator):
    config = make(ReinforcePPRunConfig, reinforce_pp=keys, generation={"num_generations": 2})
    assert (config.reinforce_pp.kl_in, config.reinforce_pp.kl_estimator) == (place, estimator)
    again = ReinforcePPRunConfig.model_validate_json(config.model_dump_json())
    assert again.reinforce_pp == config.reinforce_pp


@EACH
@pytest.mark.parametrize("reference", [{"sync_ref_model": True}, {"model_name_or_path": "some/model"}])
def test_a_reference_that_nothing_would_read_is_refused(schema, reference):
    with pytest.raises(ConfigError, match=rf"no reference is read while `{schema.SECTION}.kl_coef` is 0"):
        make(schema, reference=reference, **{schema.SECTION: {"kl_coef": 0.0}})
    assert make(schema, reference=reference, **{schema.SECTION: {"kl_coef": 0.1}}).has_reference


@EACH
def test_more_updates_than_sequences_are_refused(schema):
    with pytest.raises(ConfigError, match=rf"`{schema.SECTION}.num_mini_batches` = 9 is more than a step's 4 "):
        make(
            schema,
            data={"dataset_name": "unused", "batch_size": 2},
            generation={"num_generations": 2},
            **{schema.SECTION: {"num_mini_batches": 9}},
        )


@EACH
def test_two_rules_for_truncation_exclude_each_other(schema):
    with pytest.raises(ConfigError, match="exclude each other"):
        make(schema, **{schema.SECTION: {"mask_truncated_completions": True, "missing_eos_penalty": 1.0}})


def test_a_buffer_longer_than_any_completion_is_refused():
    with pytest.raises(ConfigError, match=r"`dapo.overlong_buffer_length` = 129 .* 128; lower it"):
        make(DAPORunConfig, dapo={"overlong_buffer_length": 129})


def test_cispo_has_no_use_for_a_dual_clip():
    assert make(GRPORunConfig, grpo={"dual_clip": 3.0}).policy.dual_clip == 3.0
    with pytest.raises(ConfigError, match="take dual_clip out"):
        make(CISPORunConfig, cispo={"dual_clip": 3.0})


def test_a_misspelt_key_is_told_its_neighbour():
    with pytest.raises(ConfigError, match=r"`grpo.scale_reward`; did you mean `grpo.scale_rewards`\?"):
        make(GRPORunConfig, grpo={"scale_reward": "none"})


def test_without_any_reward_there_is_nothing_to_learn():
    with pytest.raises(ConfigError, match="a reward is needed"):
        make(GRPORunConfig, reward={})
