"""Who runs in the next step: live sequences go on, waiting prompts enter as slots and the token budget allow.

Plain bookkeeping in the order of arrival; knows nothing of tensors, sampling or text.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from meshift.generation.cache import Prefix
from meshift.generation.params import Completion, Request
from meshift.generation.stop_strings import StopStringMatcher


@dataclass(kw_only=True)
class LiveSequence:
    """A sequence that holds a slot."""

    prompt_length: int
    completion: Completion
    matcher: StopStringMatcher | None = None

    @property
    def num_cached(self) -> int:
        """Positions in the cache: all tokens but the last, which the next step feeds."""
        return self.prompt_length + len(self.completion.tokens) - 1


@dataclass(kw_only=True)
class PromptGroup:
    """One prompt and the requests for it that wait; `prefix` is there once the prompt was run."""

    tokens: Sequence[int]
    waiting: deque[Request]
    prefix: Prefix | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass: `live` sequences advance by a token, prompts of `prefill` are run, `entering` begin.

    `entering` pairs a group with its sequences that got a slot now; they take the slots after the live ones.
    """

    live: list[LiveSequence]
    prefill: list[PromptGroup]
    entering: list[tuple[PromptGroup, list[LiveSequence]]]

    @property
    def sequences(self) -> list[LiveSequence]:
        """All that get a token in this step, in the order of their slots."""
        return [*self.live, *(sequence for _, sequences in self.entering for sequence in sequences)]


class Scheduler:
    """Requests in, steps out. Neighbouring requests with the same tokens share one prefill.

    `finished` maps indices to completions. Invariant: `live[i]` holds slot i. When a sequence leaves, the
    last one moves into its slot.
    """

    def __init__(self, requests: Sequence[Request], *, num_slots: int, prefill_budget: int):
        self._num_slots = num_slots
        self._prefill_budget = prefill_budget
        self._waiting = deque(
            PromptGroup(tokens=tokens, waiting=deque(group))
            for tokens, group in groupby(requests, key=lambda request: list(request.tokens))
        )
        self.live: list[LiveSequence] = []
        self.finished: dict[int, Completion] = {}

    @property
    def done(self) -> bool:
        """Whether nothing lives or waits."""
        return not self.live and not self._waiting

    def schedule(self) -> Step:
        """The next step. A prompt over the budget is the only one of its step, beside whatever lives."""
        step = Step(live=list(self.live), prefill=[], entering=[])
        budget = self._prefill_budget
        while self._waiting and len(self.live) < self._num_slots:
            group = self._waiting[0]
            if group.prefix is None:
                if len(group.tokens) > budget and step.prefill:
                    break
                budget -= len(group.tokens)
                step.prefill.append(group)
            step.entering.append((group, self._admit(group)))
        return step

    def _admit(self, group: PromptGroup) -> list[LiveSequence]:
        num_entering = min(self._num_slots - len(self.live), len(group.waiting))
        entering = [
            LiveSequence(
                prompt_length=len(group.tokens), completion=Completion(index=group.waiting.popleft().index)
            )
            for _ in range(num_entering)
        ]
        self.live += entering
        if not group.waiting:
            self._waiting.popleft()
        return entering

    def leave(self, finished: Sequence[bool]) -> list[tuple[int, int, int]]:
        """Free each slot i with `finished[i]`; returns the moves: (source slot, target slot, positions)."""
        moves = []
        for slot in reversed(range(len(self.live))):
            if not finished[slot]:
                continue
            self.finished[self.live[slot].completion.index] = self.live[slot].completion
            last = self.live.pop()
            if slot < len(self.live):
                self.live[slot] = last
                moves.append((len(self.live), slot, last.num_cached))
        return moves
