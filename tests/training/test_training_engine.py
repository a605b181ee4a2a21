"""Gradients do not depend on how a mini-batch is cut, and equal those of `transformers` and autograd."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_rl import random_rollout, tiny_model
from tiny_texts import random_demonstrations, random_pairs
from twins import accumulated, hidden_rows, relative_difference, twin_of

from meshift.algorithms.losses import DPOLoss, PairwiseLoss, PolicyLoss, TokenCrossEntropy, ValueLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import NonFiniteError
from meshift.training.engine import LossSums, TrainingEngine, TrainTask, mini_batch_rows
from meshift.training.readings import TokenLogprobs

CLIP = 0.2
COUNTS = (1, 2, 7)


def with_support(batch, vocab_size=13):
    """A support of every completion token: the token itself and two or three others."""
    lengths = batch["completion_lengths"].values.tolist()
    targets = torch.cat([row[-n:] for row, n in zip(batch["tokens"].rows(), lengths, strict=True)]).tolist()
    sets = [sorted({t, (t + 1) % vocab_size, (t + 5) % vocab_size, (t * i) % 4}) for i, t in enumerate(targets)]
    counts = torch.tensor([len(s) for s in sets])
    per_row = [part.sum() for part in counts.split(lengths)]
    fields = {
        "support": Ragged(torch.tensor([i for s in sets for i in s], dtype=torch.int32), torch.stack(per_row)),
        "support_counts": Ragged(counts, torch.tensor(lengths)),
    }
    return batch.union(Batch(fields))


def pairs(num_pairs=9):
    one, other = random_rollout(num_pairs, seed=1)["tokens"], random_rollout(num_pairs, seed=2)["tokens"]
    return Batch({"chosen": one, "rejected": other})


POLICY = PolicyLoss(
    reading=TokenLogprobs(temperature=0.7, with_entropy=True, entropy_gradient=True), entropy_coef=0.1
)
CASES = {
    "policy": ("lm", POLICY, random_rollout),
    "policy with a support": ("lm", POLICY, lambda: with_support(random_rollout())),
    "value": ("value", ValueLoss(), random_rollout),
    "pairwise": ("reward", PairwiseLoss(), pairs),
}


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_micro_batches_changes_neither_gradient_nor_statistics(case):
    head, loss, make_batch = CASES[case]
    whole, stats = accumulated(head, loss, make_batch(), 1)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for num_parts in COUNTS[1:]:
        gradients, others = accumulated(head, loss, make_batch(), num_parts)
        assert relative_difference(gradients, whole) < 1e-6
        assert others == pytest.approx(stats, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", ["policy", "value"])
def test_checkpointing_and_chunking_change_no_gradient(case):
    head, loss, make_batch = CASES[case]
    plain, _ = accumulated(head, loss, make_batch(), 2)
    frugal, _ = accumulated(head, loss, make_batch(), 2, gradient_checkpointing=True, logits_chunk=3)
    assert relative_difference(frugal, plain) < 1e-6


def test_the_policy_gradient_is_that_of_a_plain_computation_in_transformers(tmp_path):
    batch = random_rollout()
    ours, stats = accumulated("lm", POLICY, batch, 2)
    twin, gradients = twin_of(tiny_model(), tmp_path)
    rows, lengths = batch["tokens"].rows(), batch["completion_lengths"].values.tolist()
    table = torch.log_softmax(twin.lm_head(hidden_rows(twin, rows)) / 0.7, -1)
    terms = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for t in range(length):
            place = len(row) - length + t
            distribution = table[i, place - 1]
            advantage = batch["advantages"].rows()[i][t]
            ratio = torch.exp(distribution[row[place]] - batch["logprobs"].rows()[i][t])
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            entropy = -(distribution.exp() * distribution).sum()
            terms.append(-surrogate - 0.1 * entropy)
    loss = torch.stack(terms).mean()
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5


def test_the_value_gradient_is_that_of_a_plain_computation_in_transformers(tmp_path):
    batch = random_rollout()
    ours, stats = accumulated("value", ValueLoss(), batch, 2)
    twin, gradients = twin_of(tiny_model("value"), tmp_path)
    rows, lengths = batch["tokens"].rows(), batch["completion_lengths"].values.tolist()
    values = twin.score(hidden_rows(twin, rows))[..., 0]
    terms = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for t in range(length):
            new, old = values[i, len(row) - length + t - 1], batch["values"].rows()[i][t]
            goal = batch["returns"].rows()[i][t]
            clipped = old + (new - old).clamp(-CLIP, CLIP)
            terms.append(0.5 * torch.maximum((new - goal) ** 2, (clipped - goal) ** 2))
    loss = torch.stack(terms).mean()
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5


def test_the_pairwise_gradient_is_that_of_a_plain_computation_in_transformers(tmp_path):
    batch = pairs()
    ours, stats = accumulated("reward", PairwiseLoss(), batch, 2)
    twin, gradients = twin_of(tiny_model("reward"), tmp_path)
    scores = []
    for key in ("chosen", "rejected"):
        rows = batch[key].rows()
        last = torch.tensor([len(row) - 1 for row in rows])
        scores.append(twin.score(hidden_rows(twin, rows))[torch.arange(len(rows)), last, 0])
    loss = -torch.log(torch.sigmoid(scores[0] - scores[1])).mean()
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert stats["accuracy"] == pytest.approx(float((scores[0] > scores[1]).float().mean()))
    assert relative_difference(ours, gradients()) < 1e-5


def test_every_epoch_goes_through_all_rows_once_in_an_order_of_its_own():
    parts = list(mini_batch_rows(10, 3, 4, seed=5))
    epochs = [parts[i : i + 4] for i in (0, 4, 8)]
    assert len(parts) == 12
    for epoch in epochs:
        assert sorted(row for part in epoch for row in part) == list(range(10))
        assert {len(part) for part in epoch} == {2, 3}
    assert len({str(epoch) for epoch in epochs}) == 3
    assert parts == list(mini_batch_rows(10, 3, 4, seed=5))
    assert parts != list(mini_batch_rows(10, 3, 4, seed=6))


def test_one_update_per_mini_batch_and_each_counts():
    engine = TrainingEngine(tiny_model(), TrainableConfig(), trainable=True)
    task = TrainTask(loss=PolicyLoss(reading=TokenLogprobs()), num_epochs=2, num_mini_batches=3)
    updates = engine.train(task, random_rollout(), rate=1e-3, seed=0)
    assert (len(updates), engine.version) == (6, 6)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass(frozen=True)
class BrokenLoss(PolicyLoss):
    """A policy loss whose value or gradient is not a number."""

    kind: str = "loss"

    def __call__(self, outputs, batch):
        logprobs = outputs[self.reading.key].values
        if self.kind == "loss":
            return LossSums(total=logprobs.sum() * math.nan)
        return LossSums(total=torch.sqrt(logprobs * 0.0).sum())  # 0 with an infinite slope


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_never_reaches_the_weights(kind, dtype):
    engine = TrainingEngine(tiny_model(dtype=dtype), TrainableConfig(), trainable=True)
    before = weights_of(engine.model)
    task = TrainTask(loss=BrokenLoss(reading=TokenLogprobs(), kind=kind))
    with pytest.raises(NonFiniteError, match="the update was not made"):
        engine.train(task, random_rollout(), rate=1e-2, seed=0)
    torch.testing.assert_close(weights_of(engine.model), before, rtol=0, atol=0)
    assert engine.version == 0


def said_of(batch):
    """What is said of a reward model's training that meets a number that is none."""
    engine = TrainingEngine(tiny_model("reward"), TrainableConfig(), trainable=True, name="reward")
    with pytest.raises(NonFiniteError) as caught:
        engine.train(TrainTask(loss=PairwiseLoss()), batch, rate=0.25, seed=0)
    return str(caught.value)


def test_the_rows_that_give_no_number_are_counted_and_named_where_the_batch_knows_them():
    pairs = random_pairs(6)
    margins = pairs["required_margin"].values.clone()
    margins[[1, 4]] = math.inf
    spoiled = Batch(
        {**pairs.fields, "required_margin": Ragged.scalars(margins)}, {"where": [f"p.jsonl:{i}" for i in range(6)]}
    )
    said = said_of(spoiled)
    assert said == (
        "in update 1 of the reward the loss is inf in 2 of 6 rows (p.jsonl:1, p.jsonl:4); "
        "the update was not made: lower learning_rate (0.25 here), "
        "or look at the texts of these pairs, their weights and their margins"
    )
    assert "in 2 of 6 rows; the update" in said_of(Batch(spoiled.fields))


@pytest.mark.parametrize(
    ("head", "loss", "batch", "suspects"),
    [
        ("lm", PolicyLoss(reading=TokenLogprobs()), random_rollout(), "look for extreme rewards in samples.jsonl"),
        ("value", ValueLoss(), random_rollout(), "look for extreme rewards in samples.jsonl"),
        ("lm", TokenCrossEntropy(), random_demonstrations(), "look at these texts"),
        ("lm", DPOLoss(), random_pairs(), "look at the texts of these pairs"),
    ],
)
def test_what_to_look_at_is_of_the_loss_that_failed(head, loss, batch, suspects):
    engine = TrainingEngine(tiny_model(head), TrainableConfig(), trainable=True, name="judged")
    with torch.no_grad():
        engine.model.embedding.weight.fill_(math.nan)
    with pytest.raises(
        NonFiniteError, match=r"in update 1 of the judged the loss is nan in .*\(0\.1 here\)"
    ) as caught:
        engine.train(TrainTask(loss=loss), batch, rate=0.1, seed=0)
    assert suspects in str(caught.value)
    assert ("reward" in str(caught.value)) == ("reward" in suspects), "a run without rewards is not sent to them"


def test_a_stopped_update_and_all_after_it_leave_the_weights_alone():
    """The second of four updates stops: the weights are those after the first."""

    @dataclass(frozen=True)
    class StopsAtTwo(PolicyLoss):
        def stop_reason(self, stats):
            calls.append(stats)
            return "enough" if len(calls) == 2 else None

    calls: list[dict] = []
    task = TrainTask(loss=StopsAtTwo(reading=TokenLogprobs()), num_mini_batches=4)
    engine, other = (TrainingEngine(tiny_model(), TrainableConfig(), trainable=True) for _ in range(2))
    updates = engine.train(task, random_rollout(), rate=1e-2, seed=0)
    assert (len(updates), engine.version) == (2, 1)
    assert updates[1]["early_stop"] == 1.0
    rows = next(mini_batch_rows(9, 1, 4, seed=0))
    other.train(replace(task, num_mini_batches=1), random_rollout().index(rows), rate=1e-2, seed=0)
    assert engine.version == other.version == 1
    torch.testing.assert_close(weights_of(engine.model), weights_of(other.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_or_decay_would_move_weights_that_nothing_teaches(decay):
    """After an update that taught something, one without advantages leaves weights, moments and version alone."""
    engine = TrainingEngine(tiny_model(), TrainableConfig(weight_decay=decay), trainable=True)
    loss, batch = PolicyLoss(reading=TokenLogprobs(with_entropy=True)), random_rollout()
    none = Ragged(torch.zeros_like(batch["advantages"].values), batch["advantages"].lengths)
    idle = batch.union(Batch({"advantages": none}))
    engine.train(TrainTask(loss=loss), batch, rate=1e-2, seed=0)
    state = {key: value.clone() for key, value in engine.state().tensors.items()}
    (stats,) = engine.train(TrainTask(loss=loss), idle, rate=1e-2, seed=1)
    assert (engine.version, stats["skipped"]) == (1, 1.0)
    assert "grad_norm" not in stats
    assert stats["entropy"] > 0, "it is read all the same"
    torch.testing.assert_close(engine.state().tensors, state, rtol=0, atol=0)
    engine.train(TrainTask(loss=replace(loss, entropy_coef=0.1)), idle, rate=1e-2, seed=1)
    assert engine.version == 2


def test_the_gradient_of_a_stopped_update_is_not_in_the_next_one():
    @dataclass(frozen=True)
    class Stops(PolicyLoss):
        def stop_reason(self, stats):
            return "enough"

    stopped, fresh = (TrainingEngine(tiny_model(), TrainableConfig(), trainable=True) for _ in range(2))
    stopped.train(TrainTask(loss=Stops(reading=TokenLogprobs())), random_rollout(seed=1), rate=1e-2, seed=0)
    task = TrainTask(loss=PolicyLoss(reading=TokenLogprobs()))
    norms = [e.train(task, random_rollout(), rate=1e-2, seed=0)[0]["grad_norm"] for e in (stopped, fresh)]
    assert norms[0] == norms[1]
    torch.testing.assert_close(weights_of(stopped.model), weights_of(fresh.model), rtol=0, atol=0)
