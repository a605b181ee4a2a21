"""One step of sampling: against `transformers`' warpers, a naive computation and the exact distribution."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from meshift.errors import NonFiniteError
from meshift.generation.params import SamplingParams
from meshift.generation.random_stream import uniforms
from meshift.generation.sampler import Sampler, draw_by_block, draw_columns, truncate

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 20, "top_p": 0.6, "temperature": 1.5},
]


def warped(logits, *, temperature=1.0, top_k=0, top_p=1.0):
    """Scores after the warpers of `transformers`, in its order."""
    scores = logits.float()
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    return TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores


def random_logits(num_rows, vocab, *, scale=2.0, seed=0):
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def params(**settings):
    return SamplingParams(max_new_tokens=100, **settings)


def draw(logits, sampling, *, seed=0, position=0):
    num_rows = len(logits)
    return Sampler(sampling, seed=seed).draw(logits, range(num_rows), [position] * num_rows)


@pytest.mark.parametrize("settings", SETTINGS[2:])
@pytest.mark.parametrize("vocab", [7, 300, 5000])
@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_support_is_that_of_transformers(settings, vocab, scale):
    logits = random_logits(9, vocab, scale=scale)
    support = draw(logits, params(**settings)).support
    for row, expected in zip(support, warped(logits, **settings), strict=True):
        assert row.dtype == np.int32
        assert row.tolist() == expected.isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("num_tied", [3, 60, 400])
def test_top_k_keeps_every_token_that_ties_with_the_kth_as_transformers_does(num_tied):
    logits = torch.full((2, 1000), -5.0)
    logits[0, 500 : 500 + num_tied] = 1.0
    logits[1, 11] = 2.0
    for row, expected in zip(draw(logits, params(top_k=2)).support, warped(logits, top_k=2), strict=True):
        assert row.tolist() == expected.isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("vocab", [10, 2000])
def test_ties_at_the_nucleus_border_keep_the_lower_ids(vocab):
    (support,) = draw(torch.zeros(1, vocab), params(top_p=0.5)).support
    assert support.tolist() == list(range(vocab // 2))


def test_a_nucleus_holds_the_top_token_even_if_top_p_is_tiny():
    logits = random_logits(4, 50)
    result = draw(logits, params(top_p=1e-6))
    assert result.tokens == logits.argmax(dim=1).tolist()
    assert result.logprobs == [0.0] * 4


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_drawn_token_under_the_warped_distribution(settings, dtype):
    logits = random_logits(16, 1003).to(dtype)
    result = draw(logits, params(**settings))
    naive = warped(logits, **settings).double().log_softmax(dim=1)
    expected = naive[torch.arange(16), result.tokens].tolist()
    np.testing.assert_allclose(result.logprobs, expected, atol=2e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_drawn_frequencies_follow_the_exact_distribution(settings):
    n = 20_000
    logits = random_logits(1, 40, seed=3)
    result = draw(logits.expand(n, -1), params(**settings), seed=1)
    probabilities = warped(logits, **settings)[0].double().softmax(dim=0).numpy()
    counts = np.bincount(result.tokens, minlength=40)
    assert counts[probabilities == 0].sum() == 0
    counts, expected = counts[probabilities > 0], n * probabilities[probabilities > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 6  # beyond the 0.999 quantile


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 5000])
def test_drawing_by_block_picks_the_token_a_naive_cumulative_sum_picks(vocab):
    scores = random_logits(32, vocab)
    numbers = torch.from_numpy(uniforms(0, range(32), [0] * 32))
    cumulative = scores.double().softmax(dim=1).cumsum(dim=1)
    expected = [int((row <= u).sum()) for row, u in zip(cumulative, numbers, strict=True)]
    for function in (draw_by_block, draw_columns):
        assert function(scores, numbers)[0].tolist() == expected


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_not_drawn_at_either_end_of_the_unit_range(number):
    scores = torch.full((1, 700), float("-inf"))
    scores[0, 300:350] = torch.linspace(0, 1, 50)
    for function in (draw_by_block, draw_columns):
        (token,) = function(scores, torch.tensor([number], dtype=torch.float64))[0].tolist()
        assert token == (300 if number == 0 else 349)


def test_stop_tokens_are_impossible_before_min_new_tokens_and_possible_after():
    logits = torch.zeros(400, 4)
    sampling = params(min_new_tokens=3, stop_token_ids=(1, 2))
    early, late = draw(logits, sampling, position=2), draw(logits, sampling, position=3)
    assert set(early.tokens) == {0, 3}
    assert set(late.tokens) == {0, 1, 2, 3}
    np.testing.assert_allclose(early.logprobs, np.log(1 / 2), atol=1e-6)
    np.testing.assert_allclose(late.logprobs, np.log(1 / 4), atol=1e-6)


def test_the_support_leaves_out_forbidden_stop_tokens_and_top_k_fills_up_with_others():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    sampling = params(min_new_tokens=1, stop_token_ids=(0,), top_k=2)
    assert draw(logits, sampling, position=0).support[0].tolist() == [1, 2]
    assert draw(logits, sampling, position=1).support[0].tolist() == [0, 1]


def test_greedy_takes_the_first_largest_with_logprob_zero_and_no_support():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    result = draw(logits, params(temperature=0.0, top_k=2))
    assert (result.tokens, result.logprobs, result.support) == ([1, 0], [0.0, 0.0], None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_are_named_by_sequence_and_position(bad):
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    with pytest.raises(NonFiniteError, match="sequence 8 at generated position 2"):
        Sampler(params(), seed=0).draw(logits, [7, 8, 9], [5, 2, 0])


def test_truncation_of_a_row_does_not_depend_on_the_other_rows():
    peaked, flat = random_logits(1, 5000, scale=8), random_logits(1, 5000, scale=0.01)
    together = truncate(torch.cat([peaked, flat]), top_k=0, top_p=0.9)
    for row, logits in enumerate((peaked, flat)):
        alone = truncate(logits, top_k=0, top_p=0.9)
        kept = together.scores[row].isfinite()
        assert together.ids[row][kept].tolist() == alone.ids[0].tolist()
