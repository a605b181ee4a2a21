"""PPO's host call: who gets a score, what bootstraps, and what is whitened, from the numbers it is given."""

import pytest
import torch
from tiny_rl import ppo_config

from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import PPORunConfig
from meshift.config.sections import PPOConfig
from meshift.errors import ConfigError
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask

LENGTHS = torch.tensor([3, 2, 4])
PLAIN = {"value_norm": "none", "whiten_advantages": False}
BOOTSTRAP = 50.0


def make_ppo(config=None, **keys):
    sampling = SamplingTask(params=SamplingParams(max_new_tokens=4), seed=0)
    return PPO(config or ppo_config(ppo={**PLAIN, **keys}), sampling)


def make_batch(scores=(1.0, 2.0, 3.0), truncated=(False, True, False), key="function_scores", drift=0.25):
    """Values are zero but after the last token, where they are BOOTSTRAP; every token drifted by `drift` nats."""
    values = torch.cat([torch.tensor([0.0] * n + [BOOTSTRAP]) for n in LENGTHS.tolist()])
    ref = torch.linspace(-3, -1, int(LENGTHS.sum()))
    return Batch(
        {
            key: Ragged.scalars(torch.tensor(scores)),
            "values": Ragged(values, LENGTHS + 1),
            "logprobs": Ragged(ref + drift, LENGTHS),
            "ref_logprobs": Ragged(ref, LENGTHS),
            "truncated": Ragged.scalars(torch.tensor(truncated)),
        }
    )


def final_returns(ppo, batch):
    """Return of each row's last token: score if any, minus the KL penalty there, plus the bootstrap if any."""
    return [row[-1].item() for row in ppo.advantages(batch).batch["returns"].rows()]


def test_ended_sequences_are_worth_zero_afterwards_and_truncated_ones_bootstrap_without_a_score():
    assert final_returns(make_ppo(kl_coef=0), make_batch()) == pytest.approx([1.0, BOOTSTRAP, 3.0])


def test_a_missing_end_costs_the_penalty_on_top_of_the_score_and_still_bootstraps():
    """TRL's meaning: score - penalty."""
    returns = final_returns(make_ppo(kl_coef=0, missing_eos_penalty=0.75), make_batch())
    assert returns == pytest.approx([1.0, 2.0 - 0.75 + BOOTSTRAP, 3.0])


def test_where_the_length_limit_is_the_end_such_completions_are_complete():
    returns = final_returns(make_ppo(kl_coef=0, length_limit_is_end=True), make_batch())
    assert returns == pytest.approx([1.0, 2.0, 3.0])


def test_two_rules_for_truncation_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        make_ppo(length_limit_is_end=True, missing_eos_penalty=1.0)


@pytest.mark.parametrize(
    ("estimator", "penalty"), [("k1", 0.25), ("k2", 0.03125), ("k3", 2.718281828**-0.25 - 0.75)]
)
def test_every_token_pays_for_its_drift_from_the_reference(estimator, penalty):
    outcome = make_ppo(kl_coef=0.5, kl_estimator=estimator).advantages(make_batch())
    first = [row[0].item() for row in outcome.batch["returns"].rows()]
    costs = [-0.5 * penalty * n for n in LENGTHS.tolist()]
    assert first == pytest.approx([costs[0] + 1, costs[1] + BOOTSTRAP, costs[2] + 3], rel=1e-5)
    assert outcome.metrics["objective/kl"] == pytest.approx(0.25 * 3), "measured by k1, per completion"


def test_scores_are_clipped_but_reported_as_they_are():
    ppo = make_ppo(kl_coef=0, reward_clip=1.5)
    batch = make_batch(scores=(-7.0, 9.0, 9.0))
    assert final_returns(ppo, batch) == pytest.approx([-1.5, BOOTSTRAP, 1.5])
    assert ppo.advantages(batch).metrics["reward/mean"] == pytest.approx(11 / 3)


def test_a_reward_model_and_functions_add_up_by_weight():
    config = ppo_config(reward={"model_name_or_path": "m", "weight": 0.5}, ppo={**PLAIN, "kl_coef": 0})
    batch = make_batch(scores=(10.0, 20.0, 30.0), key="model_scores")
    batch = batch.union(Batch({"function_scores": Ragged.scalars(torch.tensor([1.0, 2.0, 3.0]))}))
    outcome = make_ppo(config).advantages(batch)
    assert outcome.batch["scores"].values.tolist() == [6.0, 12.0, 18.0]
    assert outcome.metrics["reward/reward_model"] == pytest.approx(20)
    assert outcome.metrics["reward/std"] == pytest.approx(24**0.5)


def test_the_batch_that_was_given_stays_as_it_was():
    batch = make_batch()
    before = {key: value.values.clone() for key, value in batch.fields.items()}
    make_ppo().advantages(batch)
    torch.testing.assert_close({key: value.values for key, value in batch.fields.items()}, before, rtol=0, atol=0)


def test_advantages_are_whitened_over_the_whole_batch_at_once():
    """Rows whitened apart, or mini-batches, would each have mean zero; the batch as a whole has."""
    plain = make_ppo().advantages(make_batch()).batch["advantages"]
    white = make_ppo(whiten_advantages=True).advantages(make_batch()).batch["advantages"]
    exact = plain.values.double()
    torch.testing.assert_close(
        white.values.double(), (exact - exact.mean()) / exact.std(unbiased=False), rtol=1e-5, atol=1e-5
    )
    assert max(abs(float(row.mean())) for row in white.rows()) > 0.5


def test_values_are_denormalised_before_gae_and_returns_normalised_for_the_critic():
    ppo = make_ppo(value_norm="cumulative", kl_coef=0)
    ppo.value_norm.update(torch.tensor([8.0, 12.0]))  # mean 10, std 2
    advantages = ppo.advantages(make_batch()).batch
    first = advantages["advantages"].rows()[0]
    assert first.tolist() == pytest.approx([1.0 - 10.0] * 3), "a critic's 0 means 10; the return is the score of 1"
    raw = [1.0] * 3 + [BOOTSTRAP * 2 + 10] * 2 + [3.0] * 4
    everything = torch.tensor([8.0, 12.0, *raw], dtype=torch.float64)
    expected = (torch.tensor(raw, dtype=torch.float64) - everything.mean()) / everything.std(unbiased=False)
    torch.testing.assert_close(advantages["returns"].values.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("drift", [0.25, -0.25])
def test_the_adaptive_coefficient_sees_positive_kl_in_its_unit(unit, drift):
    """Trap 2, from log-probs to coefficient: more drift than the target raises it, in both units."""
    ppo = make_ppo(adaptive_kl=True, kl_target=0.25 / 1.1, kl_target_unit=unit, kl_horizon=100, kl_coef=0.2)
    used = ppo.advantages(make_batch(drift=drift)).metrics["objective/kl_coef"]
    error = {("token", 0.25): 0.1, ("sequence", 0.25): 0.2}.get((unit, drift), -0.2)
    assert used == 0.2, "the step that was measured still pays the old price"
    assert ppo.kl.coef == pytest.approx(0.2 * (1 + error * 3 / 100))


def test_state_dict_restores_coefficient_and_statistics():
    keys = {"value_norm": "ema", "adaptive_kl": True, "kl_horizon": 10}
    one, other = make_ppo(**keys), make_ppo(**keys)
    one.advantages(make_batch())
    other.load_state_dict(one.state_dict())
    ours, theirs = (ppo.advantages(make_batch(scores=(4.0, 5.0, 6.0))) for ppo in (one, other))
    assert torch.equal(ours.batch["returns"].values, theirs.batch["returns"].values)
    assert ours.metrics == theirs.metrics
    assert ours.metrics["objective/kl_coef"] != 0.1


def test_metrics_tell_truncation_apart_from_length():
    metrics = make_ppo(length_limit_is_end=True).advantages(make_batch()).metrics
    assert metrics["response_length/mean"] == 3
    assert (metrics["response_length/min"], metrics["response_length/max"]) == (2, 4)
    assert metrics["response_length/clip_ratio"] == pytest.approx(1 / 3)
    assert metrics["objective/no_score_fraction"] == 0
    assert make_ppo().advantages(make_batch()).metrics["objective/no_score_fraction"] == pytest.approx(1 / 3)


def test_the_graph_trains_on_the_sampled_distribution_and_syncs_the_reference_when_asked():
    ema = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 3}
    config = ppo_config(reference=ema, generation={"temperature": 0.5, "top_k": 7, "min_new_tokens": 2})
    params = SamplingParams(max_new_tokens=9, min_new_tokens=2, temperature=0.5, top_k=7, stop_token_ids=(3,))
    calls = {c.name: c for c in PPO(config, SamplingTask(params=params, seed=0)).graph(lambda b: b).calls}
    for reading in (calls["reference"].task, calls["train_actor"].task.loss.reading):
        assert (reading.temperature, reading.stop_token_ids) == (0.5, (3,))
    for name in ("reference", "train_actor"):
        assert {"support", "support_counts", "num_stop_forbidden"} <= set(calls[name].reads)
    sync = calls["sync_reference"]
    assert (sync.source, sync.target, sync.rate, sync.every) == ("actor", "reference", 0.25, 3)
    assert "sync_reference" not in {c.name for c in make_ppo().graph(lambda b: b).calls}


def test_the_papers_three_keys_are_one_line_each_and_the_defaults_are_no_traps():
    lines = {"data.batch_size": 512, "ppo.whiten_advantages": True, "reference.sync_ref_model": True}
    sections: dict[str, dict] = {"data": {"dataset_name": "d"}}
    for key, value in lines.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    config = ppo_config(**sections)
    assert config.data.batch_size == 512
    assert config.reference.sync_ref_model
    assert config.generation.min_new_tokens == 0 < config.generation.max_completion_length, "trap 8"
    assert PPOConfig().gamma == PPOConfig().lam == 1.0
    with pytest.raises(ConfigError, match="min_new_tokens must not be above"):
        make_config(
            PPORunConfig, config.model_dump() | {"generation": {"min_new_tokens": 9, "max_completion_length": 8}}
        )
