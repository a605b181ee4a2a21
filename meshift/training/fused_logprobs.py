"""`token_logprobs` by Meshift's CPU kernels, block by block: fp32 logits as products give them, read twice.

As in its torch form, a row's slope is found while its logits are there. Serves bfloat16 heads that have the whole
vocabulary and no cap on logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshift.kernels.cpu import Kernels, products_for
from meshift.kernels.functions import sums_of
from meshift.models.heads import LanguageModelHead
from meshift.models.linear import fits_kernels
from meshift.models.vocabulary import WholeVocabulary
from meshift.training.wanted import Wanted

BLOCK_BYTES = 100_000_000
"""fp32 logits of a block: with fewer rows, more of the time goes into the sums of the projection's gradient."""
MIN_ROWS = 256
"""Of a block, however large the vocabulary: fewer rows would be nothing but passes over the projection."""
KEPT = "kept logit gradients"
KEPT_BYTES = 420_000_000
"""Gradients of logits (bfloat16) that may be kept for the projection's: beyond that logits are made twice."""


def serves(head: LanguageModelHead, hidden: Tensor) -> bool:
    """Whether the kernels do all that this head asks for."""
    whole = isinstance(head.vocabulary, WholeVocabulary) and head.softcap is None
    return whole and products_for(hidden) is not None and fits_kernels(head.projection)


def apply(
    hidden: Tensor, projection: Tensor, targets: Tensor, chunk: int, wanted: Wanted, keep_slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies, and whether targets are the likeliest tokens, fp32 [N] each (see `TokenTable`)."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(projection):
        raise IndexError(f"a target is not among the {len(projection)} tokens of the head")
    found: tuple[Tensor, Tensor, Tensor] = _Fused.apply(hidden, projection, targets, chunk, wanted, keep_slopes)
    return found


class _Fused(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        projection: Tensor,
        targets: Tensor,
        chunk: int,
        wanted: Wanted,
        keep_slopes: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = products_for(hidden)
        assert kernels is not None
        hidden, targets = hidden.contiguous(), targets.contiguous()
        logprobs, entropy, correct, normalisers = (torch.zeros(len(targets)) for _ in range(4))
        slopes = torch.empty_like(hidden) if keep_slopes else hidden.new_empty(0)
        back = kernels.pack_transposed(projection, room="head back") if keep_slopes else None
        size = len(hidden) * len(projection)
        keeps = keep_slopes and ctx.needs_input_grad[1] and size * hidden.element_size() <= KEPT_BYTES
        kept = kernels.take(KEPT, size) if keeps else None
        for rows, logits in _blocks(kernels, projection, hidden, chunk, wanted):
            normalisers[rows], logprobs[rows], entropies, likeliest = kernels.logprobs(
                logits,
                targets[rows],
                temperature=wanted.temperature,
                entropy=wanted.entropy,
                likeliest=wanted.likeliest,
            )
            if entropies is not None:
                entropy[rows] = entropies
            if likeliest is not None:
                correct[rows] = likeliest
            if back is not None:
                ones = torch.ones(len(logits))
                to_logits = kernels.logprob_gradients(
                    *(logits, targets[rows], normalisers[rows], ones, wanted.temperature),
                    out=None if kept is None else _part(kept, rows, len(projection)),
                )
                kernels.product(to_logits, back, out=slopes[rows])
        ctx.save_for_backward(hidden, projection, targets, slopes, normalisers)
        ctx.chunk, ctx.wanted, ctx.kernels, ctx.sums, ctx.kept = chunk, wanted, kernels, sums_of(projection), kept
        ctx.mark_non_differentiable(entropy, correct)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projection, _, slopes, _ = ctx.saved_tensors
        to_hidden = (slopes * incoming[0][:, None]).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_hidden, None, None, None, None, None
        scales = incoming[0].float().contiguous()
        sums = torch.zeros(projection.shape) if ctx.sums is None else ctx.sums()
        if ctx.kept is not None:
            gradients = _part(ctx.kept, slice(0, len(hidden)), len(projection))
            scaled = (hidden * scales[:, None]).to(hidden.dtype)
            ctx.kernels.add_weight_gradients(gradients, scaled, [sums])
            ctx.kernels.give_back(KEPT, ctx.kept)
            ctx.kept = None  # a second backward pass makes the logits again
        else:
            _add_from_logits(ctx, scales, sums)
        to_projection = sums.to(projection.dtype) if ctx.sums is None else None
        return to_hidden, to_projection, None, None, None, None


def _add_from_logits(ctx: Any, scales: Tensor, sums: Tensor) -> None:
    """Add the projection's gradient to `sums`, from logits that are made once more."""
    hidden, projection, targets, _, normalisers = ctx.saved_tensors
    for rows, logits in _blocks(ctx.kernels, projection, hidden, ctx.chunk, ctx.wanted):
        to_logits = ctx.kernels.logprob_gradients(
            logits, targets[rows], normalisers[rows], scales[rows], ctx.wanted.temperature
        )
        ctx.kernels.add_weight_gradients(to_logits, hidden[rows], [sums])


def _part(kept: Tensor, rows: slice, width: int) -> Tensor:
    """Rows of a flat piece of memory."""
    return kept[rows.start * width : rows.stop * width].view(-1, width)


def _blocks(
    kernels: Kernels, projection: Tensor, hidden: Tensor, chunk: int, wanted: Wanted
) -> Iterator[tuple[slice, Tensor]]:
    """All rows, block by block, with their fp32 logits in one buffer, -inf outside the support."""
    vocab = len(projection)
    size = max(1, min(chunk, max(MIN_ROWS, BLOCK_BYTES // (4 * vocab)), len(hidden)))
    weight = kernels.pack_here(projection, room="head")
    buffer = kernels.scratch("logits", size * vocab, torch.float32).view(size, vocab)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        logits = kernels.product(hidden[rows], weight, out=buffer[: rows.stop - start])
        if wanted.forbid is not None:
            logits.masked_fill_(wanted.forbid(start, rows.stop, logits), -torch.inf)
        yield rows, logits
