"""What generation is asked for and what it gives back: sampling parameters, requests, completions.

Knows nothing of models, tensors or text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from meshift.errors import ConfigError

FinishReason = Literal["stop_token", "stop_string", "length"]
Decode = Callable[[list[int]], str]
"""Token ids -> text, as a tokenizer's `decode`; needed only for stop strings."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The distribution a token is drawn from, and when a sequence ends; one for all sequences of a call.

    In the order in which they act (the order of `transformers`): before `min_new_tokens` tokens exist the
    stop tokens are impossible; logits are divided by `temperature` (0 is greedy); the `top_k` largest stay
    (0 is all), with every token that ties with the k-th; of what is left, renormalised, the smallest set of
    most probable tokens that reaches `top_p` stays (1 is all), of equal logits the lower token ids first.

    A stop token or the token that completes a stop string is the last of its sequence, and is kept. A stop
    string that is complete before `min_new_tokens` tokens exist does not end the sequence.

    Raises ConfigError, naming the key, for a value out of range.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        self._require(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "0 to max_new_tokens")
        usable = math.isfinite(self.temperature) and self.temperature >= 0
        self._require(usable, "temperature", "0 (greedy) or a positive number")
        self._require(self.top_k >= 0, "top_k", "0 (off) or a positive count")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)")
        self._require(min(self.stop_token_ids, default=0) >= 0, "stop_token_ids", "token ids, none negative")
        self._require(all(self.stop_strings), "stop_strings", "strings that are not empty")

    def _require(self, holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"`{key}` is {getattr(self, key)!r}; set it to {expected}.")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of a drawn one."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p cut the distribution, so that completions carry their support."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate. `index` is its own in the whole run: its random stream is (seed, index)."""

    tokens: Sequence[int]
    index: int


@dataclass(kw_only=True)
class Completion:
    """One generated sequence; `tokens`, `logprobs` and `support` run over its generated tokens only.

    `logprobs[t]` is the natural log-probability of `tokens[t]` under exactly the distribution it was drawn
    from (0.0 when greedy: that distribution is one point). A trainer that has recomputed the logits [vocab]
    of step t rebuilds this distribution so: 1. logits / temperature, in fp32; 2. if `t <
    num_stop_forbidden`, the logits of `stop_token_ids` become -inf; 3. if `support` is not None, every
    logit but those at `support[t]` becomes -inf; 4. log_softmax.

    `support[t]` (top-k or top-p only, else None) holds the sorted int32 ids that could be drawn at t; step
    2 is already in it. `num_stop_forbidden` counts the leading tokens at which min_new_tokens ruled the
    stop tokens out. `truncated` says that max_new_tokens cut the sequence before a stop.

    Example: index=3, tokens=[17, 4, 2], logprobs=[-0.1, -2.3, -0.7], truncated=False,
    finish_reason="stop_token", support=[array([4, 17]), array([4, 9]), array([2])], num_stop_forbidden=1.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = False
    finish_reason: FinishReason = "length"
    support: list[np.ndarray] | None = None
    num_stop_forbidden: int = 0
