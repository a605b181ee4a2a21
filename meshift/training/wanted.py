"""What is asked of a head beside the log-probs of targets. Knows nothing of how it is found."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Of which distribution the log-probs are, and what else is wanted of it.

    `forbid(start, stop, logits)` gives, for the logits [stop - start, vocab] of these rows, of which it reads
    shape and device only, a mask of the tokens outside the support: made block by block, so that indices are kept
    and no mask.
    """

    temperature: float = 1.0
    forbid: Callable[[int, int, Tensor], Tensor] | None = None
    entropy: bool = False
    entropy_gradient: bool = False
    likeliest: bool = False
