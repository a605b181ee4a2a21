"""Roles: a stale sampler is noticed, the sampler sees every update, and the reference's average is exact."""

import gc
import math

import pytest
import torch
from tiny_rl import make_world, ppo_config, random_rollout, tiny_model

from meshift.algorithms.losses import PolicyLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import NonFiniteError, StaleWeightsError
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.runtime import role as role_module
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

TASK = TrainTask(loss=PolicyLoss(reading=TokenLogprobs()))
SAMPLING = SamplingTask(params=SamplingParams(max_new_tokens=5), seed=0)


def make_actor(rate=0.05, **model):
    return LocalRole("actor", tiny_model(**model), TrainableConfig(learning_rate=rate), trainable=True)


def asked(num_prompts=6):
    fields = {
        "prompts": Ragged.from_rows([[1 + i % 3, 2] for i in range(num_prompts)], torch.int64),
        "index": Ragged.scalars(list(range(num_prompts)), torch.int64),
    }
    return Batch(fields)


def with_advantages(batch, seed=0):
    lengths = batch["logprobs"].lengths
    draw = torch.Generator().manual_seed(seed)
    return batch.union(Batch({"advantages": Ragged(torch.randn(int(lengths.sum()), generator=draw), lengths)}))


def test_a_batch_of_older_weights_is_refused():
    """Trap 11: what was sampled before an update must not train after it."""
    actor = make_actor().can_generate(4, str)
    batch = with_advantages(actor.generate(SAMPLING, asked()).batch)
    actor.train(TASK, batch, step=0)
    with pytest.raises(StaleWeightsError, match=r"weights of version 1, .* sampled by version \[0\]"):
        actor.train(TASK, batch, step=1)
    versions = batch["versions"]
    versions.values[:] = 1
    versions.values[7] = 0
    mixed = batch.union(Batch({"versions": versions}))
    with pytest.raises(StaleWeightsError, match=r"\[0, 1\]"):
        actor.train(TASK, mixed, step=1)


def test_a_step_that_was_stopped_before_its_first_update_has_no_gradient_norm():
    """A null in metrics.jsonl would be taken for a NaN, though nothing was measured."""
    actor = make_actor().can_generate(4, str)
    batch = with_advantages(actor.generate(SAMPLING, asked()).batch)
    stopped = TrainTask(loss=PolicyLoss(reading=TokenLogprobs(), max_importance_ratio=0.5))
    metrics = actor.train(stopped, batch, step=0).metrics
    assert metrics["actor/early_stop"] == 1.0
    assert "actor/grad_norm" not in metrics
    assert "actor/lr" in metrics
    assert math.isfinite(actor.train(TASK, batch, step=1).metrics["actor/grad_norm"])


def test_a_loss_that_is_no_number_is_said_with_step_and_role():
    actor = make_actor().can_generate(4, str)
    batch = with_advantages(actor.generate(SAMPLING, asked()).batch)
    batch["advantages"].values[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"^step 3: in update 1 of the actor the loss is nan in 1 of 6 rows"):
        actor.train(TASK, batch, step=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_draws_from_the_updated_weights(dtype):
    """Traps 11 and 12: after an update, sampled log-probs are the new model's, not the old one's."""
    actor = make_actor(dtype=dtype).can_generate(4, str)
    before = actor.generate(SAMPLING, asked()).batch
    actor.train(TASK, with_advantages(before), step=0)
    after = actor.generate(SAMPLING, asked()).batch
    recomputed = actor.infer(TokenLogprobs(), after).batch["new_logprobs"].values
    stale = LocalRole("old", tiny_model(dtype=dtype), TrainableConfig()).infer(TokenLogprobs(), after)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert after["versions"].values.tolist() == [1] * 30
    assert after["versions"].lengths.tolist() == after["logprobs"].lengths.tolist()
    assert (recomputed - after["logprobs"].values).abs().max() < tolerance
    assert (stale.batch["new_logprobs"].values - after["logprobs"].values).abs().max() > 2 * tolerance


def test_a_generation_metric_counts_tokens():
    outcome = make_actor().can_generate(4, str).generate(SAMPLING, asked())
    assert outcome.metrics["perf/generated_tokens"] == outcome.batch["logprobs"].values.numel() == 30


def weights(role):
    return {name: p.detach().clone() for name, p in role.model.named_parameters()}


def test_the_reference_is_the_exact_moving_average_of_the_actors_weights():
    """ref_n = (1 - a)^n ref_0 + a sum of (1 - a)^(n-i) actor_i."""
    rate, actor = 0.3, make_actor()
    reference = LocalRole("reference", tiny_model(seed=5), TrainableConfig())
    expected = {name: w.double() for name, w in weights(reference).items()}
    for step in range(4):
        actor.train(TASK, with_advantages(random_rollout(seed=step)), step=step)
        reference.mix(actor, rate)
        expected = {n: rate * w.double() + (1 - rate) * expected[n] for n, w in weights(actor).items()}
    for name, weight in weights(reference).items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_bf16_reference_follows_a_slow_average_that_bf16_alone_would_lose():
    """The paper's rate of 0.001: each update is below bf16's resolution, fifty of them are not."""
    rate, num_updates = 1e-3, 50
    actor = make_actor(dtype=torch.bfloat16, seed=5)
    reference = LocalRole("reference", tiny_model(dtype=torch.bfloat16), TrainableConfig())
    start = {name: w.float() for name, w in weights(reference).items()}
    addresses = {name: p.data_ptr() for name, p in reference.model.named_parameters()}
    for _ in range(num_updates):
        reference.mix(actor, rate)
    kept = (1 - rate) ** num_updates
    masters = actor.trainer.master_weights()
    for name, weight in weights(reference).items():
        expected = kept * start[name] + (1 - kept) * masters[name].float()
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), expected, rtol=2**-8, atol=1e-6)
    moved = [not torch.equal(w.float(), start[n]) for n, w in weights(reference).items()]
    assert all(moved)
    assert addresses == {name: p.data_ptr() for name, p in reference.model.named_parameters()}, "in place"


def test_the_reference_averages_masters_not_their_rounded_copies():
    actor = make_actor(rate=1e-5, dtype=torch.bfloat16)
    actor.train(TASK, with_advantages(random_rollout()), step=0)
    reference = LocalRole("reference", tiny_model(), TrainableConfig())
    reference.mix(actor, 1.0)
    masters = actor.trainer.master_weights()
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())
    torch.testing.assert_close(weights(reference), masters, rtol=0, atol=0)


def test_in_a_run_the_reference_moves_every_n_steps_only():
    ema = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
    config = ppo_config(reference=ema, generation={"max_completion_length": 3}, ppo={"num_mini_batches": 1})
    world = make_world(lambda completion_ids: [float(ids[0]) for ids in completion_ids], config)
    reference = world.roles["reference"]
    start = weights(reference)
    world.step([[1]] * 4, 0)
    torch.testing.assert_close(weights(reference), start, rtol=0, atol=0)
    world.step([[1]] * 4, 1)
    actor = weights(world.roles["actor"])
    expected = {name: 0.5 * start[name] + 0.5 * actor[name] for name in start}
    torch.testing.assert_close(weights(reference), expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(weights(reference)[n], start[n]) for n in start)


def test_an_fp32_reference_keeps_no_second_copy_of_its_weights():
    reference = LocalRole("reference", tiny_model(seed=5), TrainableConfig())
    addresses = {name: p.data_ptr() for name, p in reference.model.named_parameters()}
    reference.mix(make_actor(), 0.5)
    held = [t for t in gc.get_referents(*vars(reference).values()) if isinstance(t, torch.Tensor)]
    assert held == []
    assert addresses == {name: p.data_ptr() for name, p in reference.model.named_parameters()}, "in place"


@pytest.mark.parametrize(("trainable", "lends"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("limit", [0, 256 * 2**20])
def test_large_key_value_memory_does_not_stay_through_training(monkeypatch, trainable, lends, limit):
    """A role that only generates, on a device of its own, keeps it: fresh pages are slow."""
    monkeypatch.setattr(role_module, "KEPT_CACHE_BYTES", limit)
    actor = LocalRole("actor", tiny_model(), TrainableConfig(), trainable=trainable)
    actor.can_generate(4, str, lends=lends)
    first = actor.generate(SAMPLING, asked()).batch
    # keys and values: 2 layers, 4 slots in a bucket of 8, 2 heads, 32 positions of 4 numbers in fp32
    kept = 2 * 2 * 8 * 2 * 32 * 4 * 4
    assert actor.generator.num_kept_bytes == (0 if (trainable or lends) and limit == 0 else kept)
    assert not (trainable or lends) or actor.generator.num_packed_bytes == 0, (
        "a second copy of the weights in training"
    )
    again = actor.generate(SAMPLING, asked()).batch
    assert torch.equal(first["tokens"].values, again["tokens"].values)
