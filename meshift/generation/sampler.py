"""Draws the next token of every row in one vectorised call, and says how probable it was.

Knows nothing of caches, scheduling or text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meshift.errors import NonFiniteError
from meshift.generation.params import SamplingParams
from meshift.generation.random_stream import Integers, uniforms
from meshift.kernels.cpu import Kernels, kernels

BLOCK = 256
"""The vocabulary is summed in blocks of this many tokens; only the drawn block then token by token."""
SPARE = 32
"""Candidates sorted beyond top_k, so that a tie at the k-th rarely needs a second look."""
NUCLEUS = 512
"""Candidates sorted at first for top_p alone; as many more as needed if they do not reach it."""
ROWS = 8
"""Rows that are drawn for at once on a CPU: their scores then stay in its cache, in memory that is used again."""
NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The tokens of N rows, their log-probabilities, and what else could have been drawn (see Completion)."""

    tokens: list[int]
    logprobs: list[float]
    support: list[np.ndarray] | None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What of each row may be drawn: ascending `ids` [N, C], `scores` [N, C], -inf where not kept."""

    ids: Tensor
    scores: Tensor


class Sampler:
    """Inverse-CDF sampling: the token at which the cumulative probability first exceeds the row's number.

    The cumulative sum runs in float64 and in the order of token ids, not of probabilities: a last-bit
    change of the logits then moves the drawn token only if the number lies that close to a boundary.
    """

    def __init__(self, params: SamplingParams, *, seed: int):
        self.params = params
        self.seed = seed

    def draw(self, logits: Tensor, indices: Integers, positions: Integers) -> Draw:
        """One token for each row of `logits` [N, vocab] (any float dtype; computed in fp32).

        Row i belongs to sequence `indices[i]`, which has `positions[i]` generated tokens so far. Raises
        NonFiniteError, naming both, if a logit is NaN or infinite.
        """
        found = kernels() if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
        if found is not None and not self.params.greedy and not self.params.truncates:
            return self._draw_at_once(found, logits, indices, positions)
        step = ROWS if logits.device.type == "cpu" else max(1, len(logits))
        parts = [slice(start, start + step) for start in range(0, len(logits), step)]
        draws = [self._draw(logits[part], indices[part], positions[part]) for part in parts]
        supports = [support for draw in draws for support in draw.support or ()]
        return Draw(
            tokens=[token for draw in draws for token in draw.tokens],
            logprobs=[logprob for draw in draws for logprob in draw.logprobs],
            support=supports if self.params.truncates else None,
        )

    def _draw_at_once(self, found: Kernels, logits: Tensor, indices: Integers, positions: Integers) -> Draw:
        """All rows by a kernel that does what `_draw` does."""
        tokens, logprobs, faulty = found.draw(
            logits.contiguous(),
            torch.from_numpy(uniforms(self.seed, indices, positions)),
            temperature=self.params.temperature,
            short=torch.from_numpy((np.asarray(positions) < self.params.min_new_tokens).astype(np.uint8)),
            forbidden=torch.tensor(self.params.stop_token_ids, dtype=torch.int64),
        )
        if faulty >= 0:
            raise _not_finite(indices[faulty], positions[faulty])
        return Draw(tokens=tokens.tolist(), logprobs=logprobs.tolist(), support=None)

    def _draw(self, logits: Tensor, indices: Integers, positions: Integers) -> Draw:
        scores = logits.to(torch.float32, copy=True)
        _require_finite(scores, indices, positions)
        self._restrict(scores, positions)
        if self.params.greedy:
            return Draw(tokens=scores.argmax(dim=1).tolist(), logprobs=[0.0] * len(indices), support=None)
        numbers = torch.from_numpy(uniforms(self.seed, indices, positions)).to(scores.device)
        if not self.params.truncates:
            tokens, logprobs = draw_by_block(scores, numbers)
            return Draw(tokens=tokens.tolist(), logprobs=logprobs.tolist(), support=None)
        candidates = truncate(scores, top_k=self.params.top_k, top_p=self.params.top_p)
        columns, logprobs = draw_columns(candidates.scores, numbers)
        tokens = candidates.ids.gather(1, columns[:, None])[:, 0]
        return Draw(tokens=tokens.tolist(), logprobs=logprobs.tolist(), support=_support(candidates))

    def _restrict(self, scores: Tensor, positions: Integers) -> None:
        """Rule the stop tokens out in rows that are too short to stop, divide by the temperature; in place."""
        short = np.flatnonzero(np.asarray(positions) < self.params.min_new_tokens)
        if len(short) and self.params.stop_token_ids:
            rows = torch.from_numpy(short).to(scores.device)[:, None]
            scores[rows, torch.tensor(self.params.stop_token_ids, device=scores.device)] = NEVER
        if self.params.temperature not in (0, 1):
            scores.div_(self.params.temperature)


def _require_finite(scores: Tensor, indices: Integers, positions: Integers) -> None:
    finite = torch.isfinite(scores.sum(dim=1))  # one pass; NaN and infinities go through a sum
    if not bool(finite.all()):
        row = finite.tolist().index(False)
        raise _not_finite(indices[row], positions[row])


def _not_finite(index: int, position: int) -> NonFiniteError:
    return NonFiniteError(
        f"The logits of sequence {index} at generated position {position} are not finite; "
        "check the model's weights (a diverged update is the usual cause)."
    )


def truncate(scores: Tensor, *, top_k: int, top_p: float) -> Candidates:
    """Top-k, then top-p on what is left renormalised: candidates of `scores` [N, vocab], which may hold -inf.

    Only as many scores are sorted as the answer needs. Ties: every token that equals the k-th stays (as in
    `transformers`); at the border of the nucleus lower ids stay first (`transformers`: as its sort happens
    to fall).
    """
    vocab = scores.shape[1]
    width = min(vocab, top_k + SPARE if top_k else NUCLEUS)
    total = None if top_k else _total(scores)
    while True:
        values, ids = _leading(scores, width)
        kept = _top_k(values, top_k) if top_k else values > NEVER
        whole = not top_k or _holds_all(values, kept)
        kept = kept & _nucleus(values.masked_fill(~kept, NEVER), top_p, total)
        if width == vocab or (whole and (top_k or _holds_all(values, kept))):
            break
        width = width * 8 if width * 32 <= vocab else vocab  # beyond a quarter, sorting all costs no more
    num_columns = int(kept.sum(dim=1).max())
    ids, order = ids.masked_fill(~kept, vocab)[:, :num_columns].sort(dim=1)
    values = values.masked_fill(~kept, NEVER)[:, :num_columns].gather(1, order)
    return Candidates(ids=ids, scores=values)


def _leading(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest scores of each row and their ids, equal scores by ascending id."""
    if width == scores.shape[1]:
        return torch.sort(scores, dim=1, descending=True, stable=True)
    ids = scores.topk(width, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _top_k(values: Tensor, top_k: int) -> Tensor:
    border = values[:, min(top_k, values.shape[1]) - 1, None]
    return (values >= border) & (values > NEVER)


def _holds_all(values: Tensor, kept: Tensor) -> bool:
    """Whether nothing outside the sorted `values` can be kept: all `kept` are above the last one sorted."""
    return not bool((kept & (values == values[:, -1:])).any())


def _nucleus(values: Tensor, top_p: float, mass: Tensor | None) -> Tensor:
    """Which descending `values` have less than `top_p` of the mass (None: their own) before them."""
    if top_p >= 1:
        return torch.ones_like(values, dtype=torch.bool)
    weights = (values - values[:, :1]).exp().double()
    cumulative = weights.cumsum(dim=1)
    mass = cumulative[:, -1:] if mass is None else mass
    return cumulative - weights < top_p * mass


def _total(scores: Tensor) -> Tensor:
    """The sum of exp(score - highest score) of each row, [N, 1] float64."""
    return (scores - scores.amax(dim=1, keepdim=True)).exp_().sum(dim=1, keepdim=True).double()


def _support(candidates: Candidates) -> list[np.ndarray]:
    ids = candidates.ids.to(torch.int32).cpu().numpy()
    sizes = (candidates.scores > NEVER).sum(dim=1).tolist()
    return [row[:size].copy() for row, size in zip(ids, sizes, strict=True)]


def draw_columns(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `scores` [N, C], the column drawn by `numbers` [N], and its log-probability (fp32)."""
    highest = scores.amax(dim=1, keepdim=True)
    cumulative = (scores - highest).exp().double().cumsum(dim=1)
    total = cumulative[:, -1]
    columns = _first_above(cumulative, numbers * total)
    return columns, _logprobs(scores, columns, highest, total)


def draw_by_block(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw_columns`, for long rows: sums of blocks first, then the columns of the drawn block only."""
    num_rows, vocab = scores.shape
    highest = scores.amax(dim=1, keepdim=True)
    flat = torch.empty(num_rows, -(-vocab // BLOCK) * BLOCK, device=scores.device)
    flat[:, vocab:] = 0
    torch.sub(scores, highest, out=flat[:, :vocab]).exp_()
    weights = flat.unflatten(1, (-1, BLOCK))
    block_sums = weights.sum(dim=2).double()  # a sum in float64 would first copy all of the weights
    blocks = block_sums.cumsum(dim=1)
    total = blocks[:, -1]
    target = numbers * total
    block = _first_above(blocks, target)
    rows = torch.arange(num_rows, device=scores.device)
    before = blocks[rows, block] - block_sums[rows, block]
    inside = _first_above(weights[rows, block].double().cumsum(dim=1), (target - before).clamp(min=0))
    columns = block * BLOCK + inside
    return columns, _logprobs(scores, columns, highest, total)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first column of each row whose cumulative weight exceeds `target`; never one of weight zero.

    Rounding may put a target at the very end of its row; it is moved just inside.
    """
    last = cumulative[:, -1]
    inside = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cumulative, inside[:, None], right=True)[:, 0]


def _logprobs(scores: Tensor, columns: Tensor, highest: Tensor, total: Tensor) -> Tensor:
    drawn = scores.gather(1, columns[:, None])
    return ((drawn - highest)[:, 0].double() - total.log()).float()
