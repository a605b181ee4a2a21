"""The blockwise log-probs are autograd's over full logits, in value and in every gradient."""

import pytest
import torch
from tiny_rl import tiny_model, watch_logits
from torch import nn

from meshift.kernels.cpu import Kernels, built, products_for
from meshift.models.heads import LanguageModelHead
from meshift.training import fused_logprobs
from meshift.training import token_logprobs as subject
from meshift.training.token_logprobs import TokenTable, Wanted, plain_token_logprobs, token_logprobs

NUM_ROWS, VOCAB, HIDDEN = 23, 31, 16


def forbid_some(start, stop, logits):
    """A mask that depends on the row, so that a block that asks for the wrong rows is told apart."""
    rows = torch.arange(start, stop)[:, None]
    return (rows + torch.arange(logits.shape[1])) % 3 == 0


def problem(*, softcap=None, dtype=torch.float32, trained=True, seed=0, vocab=VOCAB):
    """A head, hidden rows and targets that no row forbids."""
    torch.manual_seed(seed)
    model = tiny_model(vocab_size=vocab, hidden_size=HIDDEN, dtype=dtype)
    head = model.head
    head.softcap = softcap
    head.projection.requires_grad_(trained)
    hidden = (3 * torch.randn(NUM_ROWS, HIDDEN)).to(dtype).requires_grad_()
    rows = torch.arange(NUM_ROWS)
    targets = torch.where(rows % 3 == 0, (rows + 1) % VOCAB, rows % VOCAB)
    targets = torch.where((rows + targets) % 3 == 0, (targets + 1) % VOCAB, targets)
    assert not forbid_some(0, NUM_ROWS, torch.zeros(NUM_ROWS, vocab))[rows, targets].any()
    return head, hidden, targets


def gradients(table: TokenTable, head, hidden, weights):
    """Of a weighted sum of log-probs, in the hidden rows and the projection."""
    wanted = [hidden, head.projection] if head.projection.requires_grad else [hidden]
    return torch.autograd.grad((table.logprobs * weights).sum(), wanted)


WANTED = {
    "plain": Wanted(),
    "temperature": Wanted(temperature=0.6),
    "support": Wanted(forbid=forbid_some),
    "entropy": Wanted(entropy=True, temperature=1.7),
    "all": Wanted(entropy=True, temperature=0.8, forbid=forbid_some, likeliest=True),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained-projection", "frozen-projection"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no-cap", "capped"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("name", WANTED)
def test_blocks_give_what_autograd_gives(name, chunk, softcap, trained):
    head, hidden, targets = problem(softcap=softcap, trained=trained)
    weights = torch.linspace(-1, 2, NUM_ROWS)
    ours = token_logprobs(head, hidden, targets, chunk, WANTED[name])
    plain = plain_token_logprobs(head, hidden, targets, NUM_ROWS, WANTED[name])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert not ours.entropy.requires_grad
    assert ours.logprobs.requires_grad
    torch.testing.assert_close(
        gradients(ours, head, hidden, weights), gradients(plain, head, hidden, weights), atol=1e-5, rtol=1e-5
    )


def test_the_plain_twin_is_a_log_softmax():
    head, hidden, targets = problem()
    table = torch.log_softmax(head(hidden) / 0.7, -1)
    targets[::4] = table.argmax(-1)[::4]
    plain = plain_token_logprobs(head, hidden, targets, 4, Wanted(temperature=0.7, entropy=True, likeliest=True))
    torch.testing.assert_close(plain.logprobs, table[torch.arange(NUM_ROWS), targets])
    torch.testing.assert_close(plain.entropy, -(table.exp() * table).sum(-1), atol=1e-4, rtol=0)
    assert torch.equal(plain.correct, (table.argmax(-1) == targets).float())
    assert 6 <= plain.correct.sum() < NUM_ROWS


def test_in_bfloat16_the_blocks_are_no_further_from_the_truth_than_autograd():
    head, hidden, targets = problem(dtype=torch.bfloat16)
    weights = torch.linspace(-1, 2, NUM_ROWS)
    truth = torch.log_softmax(hidden.double() @ head.projection.double().t(), -1)
    expected = torch.autograd.grad(
        (truth[torch.arange(NUM_ROWS), targets] * weights).sum(), [hidden, head.projection]
    )
    ours = gradients(token_logprobs(head, hidden, targets, 7, Wanted()), head, hidden, weights)
    plain = gradients(plain_token_logprobs(head, hidden, targets, 7, Wanted()), head, hidden, weights)
    for one, other, true in zip(ours, plain, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - true).norm() <= 1.2 * (other - true).norm()
        assert (one - true).norm() <= 2e-2 * true.norm()


@pytest.mark.parametrize("block_bytes", [4 * VOCAB, 4 * VOCAB * 6, 1])
def test_logits_exist_for_no_more_rows_than_a_block_holds(monkeypatch, block_bytes):
    monkeypatch.setattr(subject, "BLOCK_BYTES", block_bytes)
    head, hidden, targets = problem()
    seen = watch_logits(head)
    token_logprobs(head, hidden, targets, 5, Wanted()).logprobs.sum().backward()
    assert max(seen) == max(1, min(5, block_bytes // (4 * VOCAB)))
    assert sum(seen) == 2 * NUM_ROWS, "once to read, once for the projection's gradient"


def test_a_frozen_projection_is_multiplied_with_once():
    head, hidden, targets = problem(trained=False)
    seen = watch_logits(head)
    token_logprobs(head, hidden, targets, 5, Wanted()).logprobs.sum().backward()
    assert sum(seen) == NUM_ROWS
    assert head.projection.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("enabled", [True, False])
def test_slopes_are_computed_only_where_a_gradient_is_wanted(monkeypatch, enabled):
    head, hidden, targets = problem()
    blocks = []
    monkeypatch.setattr(
        subject, "_to_logits", lambda weights, block, scale, words: blocks.append(block.rows) or block.raw.zero_()
    )
    with torch.set_grad_enabled(enabled):
        token_logprobs(head, hidden, targets, 5, Wanted())
    assert len(blocks) == (5 if enabled else 0)


def test_an_entropy_with_a_gradient_goes_through_autograd():
    head, hidden, targets = problem()
    wanted = Wanted(entropy=True, entropy_gradient=True)
    entropy = token_logprobs(head, hidden, targets, 5, wanted).entropy
    table = torch.log_softmax(head(hidden), -1)
    (ours,) = torch.autograd.grad(entropy.sum(), hidden)
    (expected,) = torch.autograd.grad(-(table.exp() * table).sum(), hidden)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_no_rows_are_no_log_probs():
    head, hidden, targets = problem()
    table = token_logprobs(head, hidden[:0], targets[:0], 5, Wanted(entropy=True))
    assert table.logprobs.shape == (0,)
    table.logprobs.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_another_head_is_read_as_it_is():
    linear = nn.Linear(HIDDEN, VOCAB)
    assert not isinstance(linear, LanguageModelHead)
    _, hidden, targets = problem()
    ours = token_logprobs(linear, hidden, targets, 5, Wanted()).logprobs
    torch.testing.assert_close(ours, torch.log_softmax(linear(hidden), -1)[torch.arange(NUM_ROWS), targets])


EVEN_VOCAB = 32
fused_only = pytest.mark.skipif(
    products_for(torch.zeros(1, dtype=torch.bfloat16)) is None,
    reason=built().fault or "this processor multiplies faster by torch's kernels",
)


def fused_problem(monkeypatch, *, trained=True):
    """A bfloat16 head, rows and targets, an fp32 copy of both, and how often the fused form was used."""
    head, hidden, targets = problem(dtype=torch.bfloat16, trained=trained, vocab=EVEN_VOCAB)
    model = tiny_model(vocab_size=EVEN_VOCAB, hidden_size=HIDDEN)
    with torch.no_grad():
        model.head.projection.copy_(head.projection)
    model.head.projection.requires_grad_(trained)
    used, apply = [], fused_logprobs.apply
    monkeypatch.setattr(fused_logprobs, "apply", lambda *given: used.append(1) or apply(*given))
    return head, hidden, targets, model.head, hidden.detach().float().requires_grad_(), used


@fused_only
@pytest.mark.parametrize("trained", [True, False], ids=["trained-projection", "frozen-projection"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("name", WANTED)
def test_fused_log_probs_would_differ_from_the_plain_ones(monkeypatch, name, chunk, trained):
    head, hidden, targets, wide_head, wide_hidden, used = fused_problem(monkeypatch, trained=trained)
    weights, wanted = torch.linspace(-1, 2, NUM_ROWS), WANTED[name]
    ours = token_logprobs(head, hidden, targets, chunk, wanted)
    assert used
    assert not ours.entropy.requires_grad
    truth = plain_token_logprobs(wide_head, wide_hidden, targets, NUM_ROWS, wanted)
    torch.testing.assert_close(ours, truth, atol=2e-5, rtol=2e-5)  # its logits are not rounded
    if wanted.likeliest:
        assert 0 < ours.correct.sum() < NUM_ROWS
    rounded = plain_token_logprobs(head, hidden, targets, NUM_ROWS, wanted)
    found = gradients(ours, head, hidden, weights)
    for one, other, true in zip(
        found,
        gradients(rounded, head, hidden, weights),
        gradients(truth, wide_head, wide_hidden, weights),
        strict=True,
    ):
        assert one.dtype == torch.bfloat16
        assert (one - true).norm() <= 1.2 * (other - true).norm()
        assert (one - true).norm() <= 1e-2 * true.norm()


@fused_only
@pytest.mark.parametrize("block_bytes", [4 * EVEN_VOCAB, 4 * EVEN_VOCAB * 6, 1])
def test_fused_logits_would_exist_for_more_rows_than_a_block_holds(monkeypatch, block_bytes):
    head, hidden, targets, *_, used = fused_problem(monkeypatch)
    whole = token_logprobs(head, hidden, targets, 100, Wanted()).logprobs
    sizes, make = [], Kernels.logprobs
    monkeypatch.setattr(fused_logprobs, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(fused_logprobs, "MIN_ROWS", 1)
    monkeypatch.setattr(
        Kernels,
        "logprobs",
        lambda self, logits, *a, **b: sizes.append(len(logits)) or make(self, logits, *a, **b),
    )
    blocks = token_logprobs(head, hidden, targets, 5, Wanted()).logprobs
    assert max(sizes) == max(1, min(5, block_bytes // (4 * EVEN_VOCAB)))
    assert sum(sizes) == NUM_ROWS
    assert blocks.equal(whole), "a row's bits do not depend on its block"
    assert used


@fused_only
def test_fused_gradients_of_a_projection_would_be_rounded_before_they_are_added(monkeypatch):
    head, hidden, targets, wide_head, wide_hidden, _ = fused_problem(monkeypatch)
    sums = torch.zeros(EVEN_VOCAB, HIDDEN)
    head.projection.gradient_sum = lambda: sums
    for _ in range(2):
        token_logprobs(head, hidden, targets, 5, Wanted()).logprobs.sum().backward()
    plain_token_logprobs(wide_head, wide_hidden, targets, NUM_ROWS, Wanted()).logprobs.sum().backward()
    true = 2 * wide_head.projection.grad
    assert head.projection.grad is None
    assert (sums - true).norm() <= 1e-2 * true.norm()
    assert not sums.bfloat16().float().equal(sums)


@fused_only
def test_fused_log_probs_would_misread_targets_that_lie_apart(monkeypatch):
    head, hidden, targets, *_ = fused_problem(monkeypatch)
    apart = torch.stack([targets, torch.zeros_like(targets)], dim=1)[:, 0]
    expected = token_logprobs(head, hidden, targets, 5, Wanted()).logprobs
    assert token_logprobs(head, hidden, apart, 5, Wanted()).logprobs.equal(expected)


@fused_only
def test_fused_log_probs_in_inference_mode_would_spoil_those_with_gradients(monkeypatch):
    head, hidden, targets, *_ = fused_problem(monkeypatch)
    fresh = Kernels(built().library)  # with no memory yet that is used again
    monkeypatch.setattr(fused_logprobs, "products_for", lambda tensor: fresh)
    with torch.inference_mode():
        expected = token_logprobs(head, hidden, targets, 5, WANTED["support"]).logprobs
    found = token_logprobs(head, hidden, targets, 5, WANTED["support"]).logprobs
    assert found.detach().equal(expected)


@fused_only
@pytest.mark.parametrize("kept_bytes", [0, fused_logprobs.KEPT_BYTES])
def test_another_pass_would_spoil_gradients_that_are_taken_twice(monkeypatch, kept_bytes):
    monkeypatch.setattr(fused_logprobs, "KEPT_BYTES", kept_bytes)
    head, hidden, targets, *_ = fused_problem(monkeypatch)
    first, second = (token_logprobs(head, hidden, targets.roll(n), 5, Wanted()).logprobs.sum() for n in (0, 3))
    wanted = [hidden, head.projection]
    seconds = torch.autograd.grad(second, wanted)
    firsts = torch.autograd.grad(first, wanted, retain_graph=True)
    token_logprobs(head, hidden, targets.roll(5), 5, Wanted())
    assert not seconds[1].equal(firsts[1])
    again = torch.autograd.grad(first, wanted)
    assert all(one.equal(other) for one, other in zip(firsts, again, strict=True))


@fused_only
@pytest.mark.parametrize("kept_bytes", [0, fused_logprobs.KEPT_BYTES])
def test_what_is_kept_would_change_more_than_the_rounding(monkeypatch, kept_bytes):
    monkeypatch.setattr(fused_logprobs, "KEPT_BYTES", kept_bytes)
    head, hidden, targets, wide_head, wide_hidden, _ = fused_problem(monkeypatch)
    weights = torch.linspace(-1, 2, NUM_ROWS)
    ours = token_logprobs(head, hidden, targets, 5, WANTED["all"])
    truth = plain_token_logprobs(wide_head, wide_hidden, targets, NUM_ROWS, WANTED["all"])
    for one, true in zip(
        gradients(ours, head, hidden, weights), gradients(truth, wide_head, wide_hidden, weights), strict=True
    ):
        assert (one - true).norm() <= 1e-2 * true.norm()


@fused_only
def test_no_rows_would_not_be_no_fused_log_probs(monkeypatch):
    head, hidden, targets, *_, used = fused_problem(monkeypatch)
    table = token_logprobs(head, hidden[:0], targets[:0], 5, Wanted(entropy=True))
    assert used
    assert table.logprobs.shape == (0,)
    table.logprobs.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.projection.grad, torch.zeros_like(head.projection))


@fused_only
@pytest.mark.parametrize(("vocab", "softcap"), [(VOCAB, None), (EVEN_VOCAB, 2.0)])
def test_a_head_that_kernels_do_not_serve_would_be_given_to_them(monkeypatch, vocab, softcap):
    head, hidden, targets = problem(dtype=torch.bfloat16, vocab=vocab, softcap=softcap)
    monkeypatch.setattr(fused_logprobs, "apply", lambda *given: pytest.fail("fused"))
    found = token_logprobs(head, hidden, targets, 5, Wanted()).logprobs
    torch.testing.assert_close(found, plain_token_logprobs(head, hidden, targets, 5, Wanted()).logprobs)
