"""Log-probs, entropies and gradients of fp32 logits, against torch's log-softmax."""

import pytest
import torch
from kernel_twins import random_numbers
from threads import num_threads

NUM_ROWS = 12


def problem(vocab, *, ruled_out=False, scale=3.0):
    """Logits, and targets that are not ruled out; a third of the targets are the likeliest tokens."""
    logits = random_numbers(NUM_ROWS, vocab, scale=scale, dtype=torch.float32)
    targets = torch.arange(NUM_ROWS) * 7 % vocab
    if ruled_out:
        mask = (torch.arange(NUM_ROWS)[:, None] + torch.arange(vocab)) % 3 == 0
        mask[torch.arange(NUM_ROWS), targets] = False
        logits.masked_fill_(mask, -torch.inf)
    targets[::3] = logits.argmax(1)[::3]
    return logits, targets


def table_of(logits, temperature):
    """In fp64: log-softmax, and the entropy of each row."""
    table = torch.log_softmax(logits.double() / temperature, 1)
    return table, -(table.exp() * table.masked_fill(table == -torch.inf, 0)).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
@pytest.mark.parametrize("ruled_out", [True, False])
@pytest.mark.parametrize("vocab", [2, 15, 16, 61, 1000])
def test_log_probs_would_differ_from_a_log_softmax(cpu, vocab, ruled_out, temperature):
    logits, targets = problem(vocab, ruled_out=ruled_out and vocab > 2)
    found = cpu.logprobs(logits, targets, temperature=temperature, entropy=True, likeliest=True)
    table, entropy = table_of(logits, temperature)
    expected = table.gather(1, targets[:, None])[:, 0]
    normalisers = torch.logsumexp(logits.double() / temperature, 1)
    for one, true in zip(found[:3], (normalisers, expected, entropy), strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-5, atol=1e-5)
    assert found[3].equal((logits.argmax(1) == targets).float())
    assert found[3].sum() >= 4


def test_what_is_not_asked_for_would_change_the_rest(cpu):
    logits, targets = problem(61)
    whole = cpu.logprobs(logits, targets, temperature=0.7, entropy=True, likeliest=True)
    bare = cpu.logprobs(logits, targets, temperature=0.7, entropy=False, likeliest=False)
    assert bare[2:] == (None, None)
    assert all(one.equal(other) for one, other in zip(whole[:2], bare[:2], strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
@pytest.mark.parametrize("ruled_out", [True, False])
@pytest.mark.parametrize("vocab", [2, 16, 61, 1000])
def test_a_log_probs_gradient_would_differ_from_autograds(cpu, vocab, ruled_out, temperature):
    logits, targets = problem(vocab, ruled_out=ruled_out and vocab > 2)
    scales = torch.linspace(-2, 3, NUM_ROWS)
    normalisers = cpu.logprobs(logits, targets, temperature=temperature, entropy=False, likeliest=False)[0]
    found = cpu.logprob_gradients(logits, targets, normalisers, scales, temperature)
    wide = logits.double().requires_grad_()
    rows = torch.log_softmax(wide / temperature, 1).gather(1, targets[:, None])[:, 0]
    (expected,) = torch.autograd.grad((rows * scales).sum(), wide)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-6)


def test_the_first_of_equals_would_not_be_the_likeliest(cpu):
    logits = torch.zeros(3, 40)
    targets = torch.tensor([0, 1, 39])
    assert cpu.logprobs(logits, targets, temperature=1.0, entropy=False, likeliest=True)[3].tolist() == [1, 0, 0]


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_logits_would_overflow(cpu, size):
    logits = torch.tensor([[-size, size, 0.0, size]])
    found = cpu.logprobs(logits, torch.tensor([1]), temperature=1.0, entropy=True, likeliest=True)
    assert [part.item() for part in found[1:]] == pytest.approx([-0.6931472, 0.6931472, 1.0])


@pytest.mark.parametrize("place", [0, 15, 16, 60])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_would_be_hidden(cpu, place, wrong):
    logits, targets = problem(61)
    targets[5] = 30
    logits[5, place] = wrong
    _, found, entropy, _ = cpu.logprobs(logits, targets, temperature=1.0, entropy=True, likeliest=True)
    others = torch.arange(NUM_ROWS) != 5
    assert not found[5].isfinite()
    assert entropy[5].isnan()
    assert found[others].isfinite().all()


def test_a_target_that_is_ruled_out_would_have_a_probability(cpu):
    logits, targets = problem(61)
    logits[4, targets[4]] = -torch.inf
    assert cpu.logprobs(logits, targets, temperature=1.0, entropy=False, likeliest=False)[1][4] == -torch.inf


def test_a_rows_bits_would_depend_on_company_or_threads(cpu):
    logits, targets = problem(1000)
    options = {"temperature": 0.8, "entropy": True, "likeliest": True}
    whole = cpu.logprobs(logits, targets, **options)
    scales = torch.ones(NUM_ROWS)
    gradients = cpu.logprob_gradients(logits, targets, whole[0], scales, 0.8).clone()
    with num_threads(2):
        again = cpu.logprobs(logits, targets, **options)
        alone = cpu.logprobs(logits[5:6].clone(), targets[5:6].clone(), **options)
        assert cpu.logprob_gradients(logits, targets, whole[0], scales, 0.8).equal(gradients)
    assert all(one.equal(other) for one, other in zip(whole, again, strict=True))
    assert all(one[5:6].equal(other) for one, other in zip(whole, alone, strict=True))


def test_gradients_of_a_row_would_not_add_up_to_nothing(cpu):
    logits, targets = problem(61, scale=0.5)
    normalisers = cpu.logprobs(logits, targets, temperature=1.0, entropy=False, likeliest=False)[0]
    found = cpu.logprob_gradients(logits, targets, normalisers, torch.ones(NUM_ROWS), 1.0)
    assert found.float().sum(1).abs().max() < 2**-7
