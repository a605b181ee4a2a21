"""Log-probs of tokens under a language-model head, in blocks of rows, so that logits never exist for all of them.

A log-prob's gradient in its row's hidden state is a fixed vector times the gradient that comes in. The fast path
finds that vector while it has the row's logits, so that the backward pass needs none for it; a trained projection
has them made once more. It knows nothing of readings or losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from meshift.models.heads import LanguageModelHead
from meshift.models.vocabulary import Vocabulary
from meshift.training import fused_logprobs
from meshift.training.wanted import Wanted

BLOCK_BYTES = 50_000_000
"""fp32 logits of a block on the CPU: fewer rows make thin products, more leave the cache sooner (measured)."""


class TokenTable(NamedTuple):
    """Per row, in fp32: the target's log-prob, the entropy in nats, and 1 where the target is the likeliest token.

    What was not asked for is zero.
    """

    logprobs: Tensor
    entropy: Tensor
    correct: Tensor


def token_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int, wanted: Wanted) -> TokenTable:
    """Of targets [N] from hidden [N, hidden], `chunk` rows of logits at a time at most. The softmax is in fp32."""
    with_gradient = torch.is_grad_enabled() and wanted.entropy and wanted.entropy_gradient
    if with_gradient or not isinstance(head, LanguageModelHead):
        return plain_token_logprobs(head, hidden, targets, chunk, wanted)
    keep_slopes = torch.is_grad_enabled() and hidden.requires_grad
    if fused_logprobs.serves(head, hidden):
        return TokenTable(*fused_logprobs.apply(hidden, head.projection, targets, chunk, wanted, keep_slopes))
    return TokenTable(*_InBlocks.apply(hidden, head.projection, head, targets, chunk, wanted, keep_slopes))


def plain_token_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int, wanted: Wanted
) -> TokenTable:
    """The same by autograd. One part of several is computed anew in the backward pass: no logits are kept."""

    def part(start: int, stop: int) -> TokenTable:
        return _plain_part(head(hidden[start:stop]).float(), targets[start:stop], start, wanted)

    parts = []
    for start, stop in _spans(targets.shape[0], chunk):
        if torch.is_grad_enabled() and targets.shape[0] > chunk:
            parts.append(checkpoint(part, start, stop, use_reentrant=False))
        else:
            parts.append(part(start, stop))
    return TokenTable(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _plain_part(logits: Tensor, targets: Tensor, start: int, wanted: Wanted) -> TokenTable:
    logits = logits / wanted.temperature
    finite = logits
    if wanted.forbid is not None:
        forbidden = wanted.forbid(start, start + len(targets), logits)
        finite = logits.masked_fill(forbidden, 0.0)
        logits = logits.masked_fill(forbidden, -torch.inf)
    normaliser = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - normaliser
    zeros = torch.zeros_like(logprobs)
    correct = (logits.detach().argmax(-1) == targets).float() if wanted.likeliest else zeros
    if not wanted.entropy:
        return TokenTable(logprobs, zeros, correct)
    with torch.set_grad_enabled(wanted.entropy_gradient and torch.is_grad_enabled()):
        entropy = normaliser - (torch.exp(logits - normaliser[:, None]) * finite).sum(-1)
    return TokenTable(logprobs, entropy, correct)


class _InBlocks(torch.autograd.Function):
    """See `token_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        projection: Tensor,
        head: LanguageModelHead,
        targets: Tensor,
        chunk: int,
        wanted: Wanted,
        keep_slopes: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy, correct = (torch.zeros(len(targets), device=hidden.device) for _ in range(3))
        normalisers, words = torch.empty_like(logprobs), head.vocabulary
        slopes = torch.empty_like(hidden) if keep_slopes else hidden.new_empty(0)
        for block in _blocks(head, hidden, targets, chunk, wanted):
            rows, logits = block.rows, block.logits
            if wanted.likeliest:
                correct[rows] = (words.likeliest(logits) == block.targets).float()
            highest = words.max(logits.amax(-1, keepdim=True))
            at_target = words.pick(logits, block.targets) - highest
            logits.sub_(highest)
            weights = logits.exp() if wanted.entropy else logits.exp_()
            total = words.sum(weights.sum(-1, keepdim=True))
            logprobs[rows] = (at_target - total.log())[:, 0]
            normalisers[rows] = (highest + total.log())[:, 0]
            if wanted.entropy:
                finite = logits if block.forbidden is None else logits.masked_fill_(block.forbidden, 0.0)
                mean = words.sum(finite.mul_(weights).sum(-1, keepdim=True)) / total
                entropy[rows] = (total.log() - mean)[:, 0]
            if keep_slopes:
                scale = torch.full_like(total, 1.0 / wanted.temperature)
                torch.mm(_to_logits(weights.div_(total), block, scale, words), projection, out=slopes[rows])
        slopes = words.sum(slopes)
        ctx.save_for_backward(hidden, projection, targets, slopes, normalisers)
        ctx.head, ctx.chunk, ctx.wanted = head, chunk, wanted
        ctx.mark_non_differentiable(entropy, correct)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projection, targets, slopes, normalisers = ctx.saved_tensors
        to_hidden = to_projection = None
        if ctx.needs_input_grad[0]:
            to_hidden = (slopes * incoming[0][:, None]).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            to_projection = torch.zeros_like(projection)
            for block in _blocks(ctx.head, hidden, targets, ctx.chunk, ctx.wanted):
                probabilities = block.logits.sub_(normalisers[block.rows, None]).exp_()
                scale = incoming[0][block.rows, None] / ctx.wanted.temperature
                to_logits = _to_logits(probabilities, block, scale, ctx.head.vocabulary)
                to_projection.addmm_(to_logits.t(), hidden[block.rows])
        return to_hidden, to_projection, None, None, None, None, None


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some rows: `logits` [n, vocab] in fp32, divided by the temperature, -inf outside the support.

    They may be overwritten. `raw` is what the head gave. Where it has a part of the vocabulary, so have they.
    """

    rows: slice
    targets: Tensor
    logits: Tensor
    raw: Tensor
    forbidden: Tensor | None
    slope: Tensor | None


def _blocks(
    head: LanguageModelHead, hidden: Tensor, targets: Tensor, chunk: int, wanted: Wanted
) -> Iterator[_Block]:
    """All rows, block by block, in one buffer."""
    vocab, words = head.projection.shape[0], head.vocabulary
    size = chunk if hidden.is_cuda else max(1, min(chunk, BLOCK_BYTES // (4 * vocab)))
    buffer = torch.empty(min(size, len(targets)), vocab, device=hidden.device)
    for start, stop in _spans(len(targets), size):
        raw = head.part(hidden[start:stop])
        logits = buffer[: stop - start].copy_(raw)
        if wanted.temperature != 1.0:
            logits.div_(wanted.temperature)
        forbidden = None
        if wanted.forbid is not None:
            whole = logits[:1, :1].expand(stop - start, head.vocab_size)  # no memory: only its shape is read
            forbidden = words.columns(wanted.forbid(start, stop, whole))
            logits.masked_fill_(forbidden, -torch.inf)
        yield _Block(
            rows=slice(start, stop),
            targets=targets[start:stop],
            logits=logits,
            raw=raw,
            forbidden=forbidden,
            slope=head.cap_slope(raw),
        )


def _to_logits(probabilities: Tensor, block: _Block, scale: Tensor, words: Vocabulary) -> Tensor:
    """The gradient of `scale` [n, 1] x log-prob in what the projection gives, in its type; overwrites both."""
    gradient = probabilities.mul_(-scale)
    words.add_at(gradient, block.targets, scale)
    if block.slope is not None:
        gradient.mul_(block.slope)
    return block.raw.copy_(gradient)


def _spans(num_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every part, and of an empty one where there are no rows."""
    for start in range(0, max(1, num_rows), size):
        yield start, min(start + size, num_rows)
