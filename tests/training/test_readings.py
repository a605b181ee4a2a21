"""Log-probs are of the sampled distribution, whatever the chunk, and logits never exist for more than a chunk."""

import gc

import pytest
import torch
from tiny_rl import random_rollout, tiny_model, watch_logits

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.generation.plain import generate_plain
from meshift.generation.rollout import SamplingTask, rollout
from meshift.models.attention import PlainAttention, packed_positions
from meshift.training.engine import TrainingEngine
from meshift.training.readings import SequenceScores, TokenLogprobs, TokenValues

STOPS = (2, 5)
SAMPLINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.7},
    "min-new-tokens": {"min_new_tokens": 4},
    "everything": {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_new_tokens": 3},
}


def completions_of(batch):
    """(tokens, completion length) of each row."""
    lengths = batch["completion_lengths"].values.tolist()
    return list(zip((row for row in batch["tokens"].rows()), lengths, strict=True))


def naive_logits(model, row):
    """All logits of one sequence alone."""
    return model.head(model(row, packed_positions([len(row)]), PlainAttention([len(row)])))


def naive(model, batch, temperature=1.0):
    """Log-probs and entropies, one sequence at a time, from full logits."""
    logprobs, entropies = [], []
    for row, length in completions_of(batch):
        table = torch.log_softmax(naive_logits(model, row)[-length - 1 : -1] / temperature, -1)
        logprobs.append(table[torch.arange(length), row[-length:]])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_logprobs_and_entropies_equal_those_of_full_logits_in_value_and_gradient(chunk, tied, entropy_gradient):
    model, batch = tiny_model(tied=tied), random_rollout()
    config = TrainableConfig(logits_chunk=chunk)
    reading = TokenLogprobs(temperature=0.7, with_entropy=True, entropy_gradient=entropy_gradient)
    outputs = TrainingEngine(model, config, trainable=False).forward(reading, batch)
    weights = torch.linspace(-1, 2, outputs["entropy"].values.numel())
    logprobs, entropy = naive(model, batch, 0.7)
    torch.testing.assert_close(outputs["new_logprobs"].values, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs["entropy"].values, entropy, atol=1e-5, rtol=0)
    ours = gradients(model, ((outputs["new_logprobs"].values + outputs["entropy"].values) * weights).sum())
    expected = ((logprobs + (entropy if entropy_gradient else entropy.detach())) * weights).sum()
    torch.testing.assert_close(ours, gradients(model, expected), atol=1e-4, rtol=1e-4)


def test_the_entropy_needs_no_gradient_where_no_bonus_asks_for_one():
    engine = TrainingEngine(tiny_model(), TrainableConfig(), trainable=False)
    outputs = engine.forward(TokenLogprobs(with_entropy=True), random_rollout())
    assert not outputs["entropy"].values.requires_grad
    assert outputs["new_logprobs"].values.requires_grad


@pytest.mark.parametrize("with_gradient", [False, True])
def test_logits_never_exist_for_more_than_a_chunk_of_tokens(with_gradient):
    model, batch = tiny_model(), random_rollout()
    seen = watch_logits(model.head)
    engine = TrainingEngine(model, TrainableConfig(logits_chunk=4), trainable=False)
    if with_gradient:
        outputs = engine.forward(TokenLogprobs(), batch)
        num_forward = len(seen)
        outputs["new_logprobs"].values.sum().backward()
        assert len(seen) == 2 * num_forward, "the backward pass must make the logits anew, not keep them"
    else:
        engine.infer(TokenLogprobs(), batch)
    assert max(seen) == 4


def test_no_mask_of_tokens_by_vocabulary_is_kept_for_the_backward_pass():
    """The support travels as indices; between forward and backward no boolean [chunk, vocab] may live."""
    model = tiny_model(vocab_size=61)
    batch, _ = drawn(model, {"top_k": 4})
    engine = TrainingEngine(model, TrainableConfig(logits_chunk=3), trainable=False)
    outputs = engine.forward(TokenLogprobs(stop_token_ids=STOPS), batch)
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.bool]
    assert outputs["new_logprobs"].values.requires_grad
    assert not [mask for mask in alive if mask.shape[-1:] == (61,)]


def drawn(model, sampling, *, max_new_tokens=7):
    """A rollout by the engine and the task it was drawn with."""
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=STOPS, **sampling)
    prompts = [[1, 3, 4], [7], [6, 2], [6, 2], [9, 9, 1, 0]] * 2
    asked = {"prompts": Ragged.from_rows(prompts), "index": Ragged.scalars(list(range(len(prompts))))}
    task = SamplingTask(params=params, seed=3)
    return rollout(GenerationEngine(model, num_slots=4), task, Batch(asked), version=0), task


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_training_and_reference_see_the_distribution_that_was_sampled(name, tied):
    sampling = SAMPLINGS[name]
    model = tiny_model(tied=tied)
    batch, task = drawn(model, sampling)
    reading = TokenLogprobs(temperature=sampling.get("temperature", 1.0), stop_token_ids=STOPS)
    narrow = batch.select(("tokens", "completion_lengths", *task.support_keys))
    trainer = TrainingEngine(model, TrainableConfig(logits_chunk=3), trainable=True)
    trained = trainer.forward(reading, narrow)["new_logprobs"].values
    reference = TrainingEngine(
        tiny_model(tied=tied), TrainableConfig(max_tokens_per_micro_batch=20), trainable=False
    )
    torch.testing.assert_close(trained, batch["logprobs"].values, atol=1e-5, rtol=0)
    torch.testing.assert_close(reference.infer(reading, narrow)["new_logprobs"].values, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p", "min-new-tokens"])
def test_logprobs_that_ignore_a_sampling_option_are_told_apart(name):
    model = tiny_model()
    batch, _ = drawn(model, SAMPLINGS[name])
    engine = TrainingEngine(model, TrainableConfig(), trainable=False)
    ignorant = engine.infer(TokenLogprobs(), batch.select(("tokens", "completion_lengths")))
    assert (ignorant["new_logprobs"].values - batch["logprobs"].values).abs().max() > 1e-2


def test_the_reference_masks_what_the_actor_could_not_draw():
    """Another model under the actor's support, against a naive masked softmax."""
    sampling = {"top_k": 3, "min_new_tokens": 2}
    params = SamplingParams(max_new_tokens=6, stop_token_ids=STOPS, **sampling)
    batch, _ = drawn(tiny_model(), sampling, max_new_tokens=6)
    reference = tiny_model(seed=1)
    engine = TrainingEngine(reference, TrainableConfig(logits_chunk=2), trainable=False)
    ours = engine.infer(TokenLogprobs(stop_token_ids=STOPS), batch)["new_logprobs"].rows()
    prompts = [row[: len(row) - n].tolist() for row, n in completions_of(batch)]
    plain = generate_plain(tiny_model(), prompts, params, seed=3)
    for (row, length), completion, logprobs in zip(completions_of(batch), plain, ours, strict=True):
        logits = naive_logits(reference, row)[-length - 1 : -1]
        for t, allowed in enumerate(completion.support):
            expected = logits[t, row[len(row) - length + t]] - torch.logsumexp(logits[t, allowed.tolist()], 0)
            assert abs(float((logprobs[t] - expected).detach())) < 1e-5


def test_values_are_read_before_each_completion_token_and_after_the_last():
    model, batch = tiny_model("value"), random_rollout()
    values = TrainingEngine(model, TrainableConfig(), trainable=False).infer(TokenValues(), batch)["values"]
    for (row, length), got in zip(completions_of(batch), values.rows(), strict=True):
        torch.testing.assert_close(got, naive_logits(model, row)[-length - 1 :], atol=1e-5, rtol=0)


def test_scores_are_read_at_the_last_token_of_each_sequence():
    model, batch = tiny_model("reward"), random_rollout()
    texts = batch["tokens"].rows()
    engine = TrainingEngine(model, TrainableConfig(max_tokens_per_micro_batch=16), trainable=False)
    expected = torch.stack([naive_logits(model, row)[-1] for row in texts])
    scores = engine.infer(SequenceScores(), batch)["scores"].values
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
