"""Who runs in the next step: live sequences go on, waiting prompts enter as slots and the token budget allow.

Plain bookkeeping in the order of arrival; knows nothing of tensors, sampling or text.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from meshift.generation.cache import Prefix
from meshift.generation.params import Request

ADMISSION_PART = 8
"""While sequences live, others wait until one in this many slots is free: prompts then run several at a time."""


@dataclass(kw_only=True)
class PromptGroup:
    """One prompt and the requests for it that wait; `prefix` is there once some entered and others wait on."""

    tokens: Sequence[int]
    waiting: deque[Request]
    prefix: Prefix | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Sequences of one prompt that got slots: the first has slot `slot`, the others those after it."""

    group: PromptGroup
    requests: list[Request]
    slot: int

    @property
    def stop(self) -> int:
        """The slot after the last."""
        return self.slot + len(self.requests)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The sequences of slots 0 to `num_live` advance by a token; `entering` ones begin, in the slots after those.

    The prompts of entries without a prefix are run in this step.
    """

    num_live: int
    entering: list[Entry]

    @property
    def prefill(self) -> list[Entry]:
        """Entries whose prompt is run now."""
        return [entry for entry in self.entering if entry.group.prefix is None]


class Scheduler:
    """Requests in, steps out. Neighbouring requests with the same tokens share one prefill.

    Live sequences have the slots from 0 to `num_live`. When a sequence leaves, the last one moves into its slot.
    """

    def __init__(self, requests: Sequence[Request], *, num_slots: int, prefill_budget: int):
        self._num_slots = num_slots
        self._prefill_budget = prefill_budget
        self._waiting = deque(
            PromptGroup(tokens=tokens, waiting=deque(group))
            for tokens, group in groupby(requests, key=lambda request: list(request.tokens))
        )
        self._num_waiting = len(requests)
        self.num_live = 0

    @property
    def done(self) -> bool:
        """Whether nothing lives or waits."""
        return not self.num_live and not self._waiting

    def schedule(self) -> Step:
        """The next step. A prompt over the budget is the only one of its step, beside whatever lives."""
        step = Step(num_live=self.num_live, entering=[])
        budget = self._prefill_budget
        while self._may_admit(step):
            group = self._waiting[0]
            if group.prefix is None:
                if len(group.tokens) > budget and step.prefill:
                    break
                budget -= len(group.tokens)
            step.entering.append(self._admit(group))
        return step

    def _may_admit(self, step: Step) -> bool:
        num_free = self._num_slots - self.num_live
        if not num_free or not self._waiting:
            return False
        enough = min(self._num_waiting, self._num_slots // ADMISSION_PART)
        return bool(step.entering) or not self.num_live or num_free >= enough

    def _admit(self, group: PromptGroup) -> Entry:
        num_entering = min(self._num_slots - self.num_live, len(group.waiting))
        requests = [group.waiting.popleft() for _ in range(num_entering)]
        entry = Entry(group=group, requests=requests, slot=self.num_live)
        self.num_live += num_entering
        self._num_waiting -= num_entering
        if not group.waiting:
            self._waiting.popleft()
        return entry

    def leave(self, ended: Sequence[int]) -> list[tuple[int, int]]:
        """Free the slots of `ended`, ascending; returns the moves that close the gaps: (source, target) slots."""
        moves = []
        for slot in reversed(ended):
            self.num_live -= 1
            if slot < self.num_live:
                moves.append((self.num_live, slot))
        return moves
