"""The draw: the tokens of the sampler's torch form, and what must never be drawn."""

import pytest
import torch
from kernel_twins import random_numbers
from threads import num_threads

from meshift.generation.sampler import draw_by_block

NOTHING = torch.empty(0, dtype=torch.int64)


def draw(cpu, logits, numbers, *, temperature=1.0, short=None, forbidden=NOTHING):
    short = torch.zeros(len(logits), dtype=torch.uint8) if short is None else short
    return cpu.draw(logits, numbers, temperature=temperature, short=short, forbidden=forbidden)


def uniform(size, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("vocab", [1, 5, 16, 61, 256, 257, 1000, 5003])
def test_another_token_would_be_drawn_than_torch_draws(cpu, vocab, temperature):
    logits, numbers = random_numbers(200, vocab, scale=3, dtype=torch.float32), uniform(200)
    before = logits.clone()
    tokens, logprobs, faulty = draw(cpu, logits, numbers, temperature=temperature)
    expected, expected_logprobs = draw_by_block(logits / temperature, numbers)
    same = tokens == expected
    assert faulty == -1
    assert same.sum() >= 198
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=0, atol=1e-5)
    whole = torch.log_softmax(logits.double() / temperature, 1)
    torch.testing.assert_close(logprobs.double(), whole.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    assert logits.equal(before)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_would_not_follow_the_softmax(cpu, temperature):
    num_rows = 4000
    logits = torch.tensor([0.0, 1.0, -2.0, 2.0, 0.5])
    numbers = (torch.arange(num_rows, dtype=torch.float64) + 0.5) / num_rows  # each part of [0, 1) once
    tokens = draw(cpu, logits.repeat(num_rows, 1), numbers, temperature=temperature)[0]
    share = torch.bincount(tokens, minlength=5) / num_rows
    torch.testing.assert_close(share, torch.softmax(logits / temperature, 0), rtol=0, atol=1.5 / num_rows)
    assert (tokens.diff() >= 0).all(), "ascending numbers draw ascending ids"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [40, 300, 1000])
def test_a_forbidden_token_would_be_drawn_or_its_logit_lost(cpu, vocab, temperature):
    logits = random_numbers(100, vocab, dtype=torch.float32)
    forbidden = torch.tensor([3, 0, vocab - 1, 3])
    logits[:, forbidden] += 8
    before, numbers = logits.clone(), uniform(100)
    short = (torch.arange(100) % 2).to(torch.uint8)
    tokens, logprobs, _ = draw(cpu, logits, numbers, temperature=temperature, short=short, forbidden=forbidden)
    assert logits.equal(before)
    drawn = torch.isin(tokens, forbidden)
    assert not drawn[short == 1].any()
    assert drawn[short == 0].sum() > 40
    scores = before / temperature
    scores[(short == 1).nonzero(), forbidden] = -torch.inf
    expected, expected_logprobs = draw_by_block(scores, numbers)
    same = tokens == expected
    assert same.sum() >= 99
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 255, 256, 300])
@pytest.mark.parametrize("row", [0, 2])
def test_a_row_that_is_not_finite_would_not_be_named(cpu, wrong, place, row):
    logits = random_numbers(5, 301, dtype=torch.float32)
    logits[row, place] = wrong
    logits[4, 7] = wrong
    for threads in (1, 2):
        with num_threads(threads):
            assert draw(cpu, logits, uniform(5))[2] == row


def test_a_forbidden_logit_that_is_no_number_would_pass(cpu):
    logits = random_numbers(2, 20, dtype=torch.float32)
    logits[1, 3] = torch.nan
    short = torch.ones(2, dtype=torch.uint8)
    assert draw(cpu, logits, uniform(2), short=short, forbidden=torch.tensor([3]))[2] == 1


@pytest.mark.parametrize("vocab", [5, 256, 300, 1025])
def test_a_number_at_either_end_would_draw_a_token_without_probability(cpu, vocab):
    logits = torch.full((2, vocab), -200.0)
    likely = [vocab // 3, vocab // 3 + 1]
    logits[:, likely] = torch.tensor([1.0, 2.0])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(cpu, logits, ends)[0].tolist() == likely


@pytest.mark.parametrize("vocab", [7, 700])
def test_numbers_just_below_one_would_leave_the_vocabulary(cpu, vocab):
    logits = random_numbers(300, vocab, scale=5, dtype=torch.float32)
    numbers = torch.full((300,), 1 - 2**-53, dtype=torch.float64)
    tokens, logprobs, _ = draw(cpu, logits, numbers)
    assert ((tokens >= 0) & (tokens < vocab)).all()
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_would_overflow(cpu, size):
    logits = torch.tensor([[-size, size, 0.0, size]])
    tokens, logprobs, faulty = draw(cpu, logits, torch.tensor([0.75], dtype=torch.float64))
    assert (tokens.item(), faulty) == (3, -1)
    assert logprobs.item() == pytest.approx(-0.6931472)


def test_a_row_whose_scaled_logits_overflow_would_read_outside_it(cpu):
    logits = torch.full((1, 32), 3e38)
    _, _, faulty = draw(cpu, logits, torch.tensor([0.5], dtype=torch.float64), temperature=0.1)
    assert faulty == 0


def test_a_rows_token_would_depend_on_company_or_threads(cpu):
    logits, numbers = random_numbers(50, 1000, dtype=torch.float32), uniform(50)
    whole = draw(cpu, logits, numbers)
    for threads in (1, 2):
        with num_threads(threads):
            again = draw(cpu, logits, numbers)
            alone = draw(cpu, logits[9:10].clone(), numbers[9:10].clone())
        assert all(one.equal(other) for one, other in zip(whole[:2], again[:2], strict=True))
        assert all(one[9:10].equal(other) for one, other in zip(whole[:2], alone[:2], strict=True))


def test_no_rows_would_be_a_faulty_one(cpu):
    tokens, logprobs, faulty = draw(cpu, torch.empty(0, 61), uniform(0))
    assert (len(tokens), len(logprobs), faulty) == (0, 0, -1)
