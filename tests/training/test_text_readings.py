"""Log-probs of given texts are those of full logits, of the trained tokens and no others, whatever the chunk."""

import pytest
import torch
from tiny_rl import tiny_model, watch_logits
from tiny_texts import random_demonstrations, random_pairs

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.models.attention import PlainAttention, packed_positions
from meshift.training.engine import TrainingEngine
from meshift.training.text_readings import (
    PairLogprobs,
    PairScores,
    TrainedTokens,
    num_completion_tokens,
    num_trained_tokens,
)


def log_table(model, row):
    """Log-probs [length, vocab] of one text alone."""
    hidden = model(row, packed_positions([len(row)]), PlainAttention([len(row)]))
    return torch.log_softmax(model.head(hidden), -1)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk", [3, 1000])
def test_only_masked_tokens_are_read_and_never_a_first_one(chunk):
    model, batch = tiny_model(), random_demonstrations()
    engine = TrainingEngine(model, TrainableConfig(logits_chunk=chunk), trainable=False)
    outputs = engine.forward(TrainedTokens(), batch)
    expected, hits, counts = [], [], []
    for row, mask in zip(batch["tokens"].rows(), batch["loss_mask"].rows(), strict=True):
        table = log_table(model, row)
        places = [t for t in range(1, len(row)) if mask[t]]
        expected += [table[t - 1, row[t]] for t in places]
        hits += [float(table[t - 1].argmax() == row[t]) for t in places]
        counts.append(len(places))
    assert sum(int(mask[0]) for mask in batch["loss_mask"].rows()) > 0, "a first token is in a mask"
    assert outputs["logprobs"].lengths.tolist() == counts == num_trained_tokens(batch).tolist()
    torch.testing.assert_close(outputs["logprobs"].values, torch.stack(expected), atol=1e-5, rtol=0)
    assert outputs["correct"].values.tolist() == hits
    weights = torch.linspace(-1, 2, sum(counts))
    ours = gradients(model, (outputs["logprobs"].values * weights).sum())
    theirs = gradients(model, (torch.stack(expected) * weights).sum())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_scores_of_pairs_are_read_at_the_last_token_of_each_text():
    model, pairs = tiny_model("reward"), random_pairs()
    engine = TrainingEngine(model, TrainableConfig(max_tokens_per_micro_batch=16), trainable=False)
    scores = engine.infer(PairScores(), pairs)
    for side in ("chosen", "rejected"):
        for row, got in zip(pairs[side].rows(), scores[f"{side}_scores"].values, strict=True):
            hidden = model(row, packed_positions([len(row)]), PlainAttention([len(row)]))
            torch.testing.assert_close(got, model.head(hidden)[-1], atol=1e-5, rtol=0)


def test_reading_the_mask_does_not_change_it():
    batch = random_demonstrations()
    mask = Ragged(batch["loss_mask"].values.long(), batch["loss_mask"].lengths)
    before = mask.values.clone()
    num_trained_tokens(batch.union(Batch({"loss_mask": mask})))
    assert torch.equal(mask.values, before)


def test_a_batch_without_trained_tokens_reads_nothing_and_still_has_a_gradient():
    batch = random_demonstrations()
    nothing = Batch({"loss_mask": Ragged(torch.zeros_like(batch["loss_mask"].values), batch["tokens"].lengths)})
    engine = TrainingEngine(tiny_model(), TrainableConfig(), trainable=False)
    outputs = engine.forward(TrainedTokens(), batch.union(nothing))
    assert outputs["logprobs"].values.shape == (0,)
    outputs["logprobs"].values.sum().backward()


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_pairs_log_probs_are_sums_over_each_completion_and_not_the_prompt(chunk):
    model, batch = tiny_model(), random_pairs()
    engine = TrainingEngine(model, TrainableConfig(logits_chunk=chunk), trainable=False)
    outputs = engine.forward(PairLogprobs(prefix="ref_"), batch)
    for side in ("chosen", "rejected"):
        sums = []
        for row, num_prompt in zip(batch[side].rows(), batch["num_prompt_tokens"].values.tolist(), strict=True):
            table = log_table(model, row)
            sums.append(sum(table[t - 1, row[t]] for t in range(max(num_prompt, 1), len(row))))
        read = outputs[f"ref_{side}_logps"]
        assert read.lengths.tolist() == [1] * len(batch)
        torch.testing.assert_close(read.values, torch.stack(sums), atol=1e-4, rtol=0)


def test_a_completion_is_what_follows_the_prompt_or_all_but_the_first_token():
    batch = Batch(
        {
            "chosen": Ragged.from_rows([[1, 2, 3, 4], [1, 2, 3, 4]]),
            "rejected": Ragged.from_rows([[1, 2, 5], [6]]),
            "num_prompt_tokens": Ragged.scalars([2, 0]),
        }
    )
    assert num_completion_tokens(batch, "chosen").tolist() == [2, 3]
    assert num_completion_tokens(batch, "rejected").tolist() == [1, 0]
    engine = TrainingEngine(tiny_model(), TrainableConfig(), trainable=False)
    assert engine.infer(PairLogprobs(), batch)["rejected_logps"].values[1] == 0.0


@pytest.mark.parametrize(
    ("reading", "make"), [(TrainedTokens(), random_demonstrations), (PairLogprobs(), random_pairs)]
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_logits_of_texts_never_exist_for_more_than_a_chunk(reading, make, with_gradient):
    model = tiny_model()
    seen = watch_logits(model.head)
    engine = TrainingEngine(model, TrainableConfig(logits_chunk=4), trainable=False)
    if with_gradient:
        outputs = engine.forward(reading, make())
        num_forward = len(seen)
        next(iter(outputs.values())).values.sum().backward()
        assert len(seen) == 2 * num_forward, "the backward pass must make the logits anew, not keep them"
    else:
        engine.infer(reading, make())
    assert max(seen) == 4
