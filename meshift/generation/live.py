"""The sequences that hold a slot, as arrays with a row for each: no Python per token but for stop strings.

Knows nothing of tensors on a device, of the schedule, or of the distribution that tokens come from.
"""

import numpy as np

from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.generation.requests import conclude
from meshift.generation.sampler import Draw
from meshift.generation.stop_strings import StopStringMatcher


class LiveRows:
    """Slot i's numbers are in row i of every array.

    `indices` are the sequences' own; `num_tokens` counts the generated `tokens` [slots, max_new_tokens].
    """

    def __init__(self, num_slots: int, params: SamplingParams, decode: Decode | None):
        self._params = params
        self._decode = decode if params.stop_strings else None
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)
        self.indices, self.prompt_lengths, self.num_tokens = (np.zeros(num_slots, dtype=np.int64) for _ in "ipn")
        self.tokens = np.zeros((num_slots, params.max_new_tokens), dtype=np.int64)
        self._logprobs = np.zeros((num_slots, params.max_new_tokens), dtype=np.float32)
        self._supports: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
        self._matchers: list[StopStringMatcher | None] = [None] * num_slots
        self._matched = np.zeros(num_slots, dtype=bool)  # by the newest token

    def enter(self, slot: int, request: Request) -> None:
        """Begin a sequence."""
        self.indices[slot], self.prompt_lengths[slot] = request.index, len(request.tokens)
        self.num_tokens[slot] = 0
        self._supports[slot] = []
        if self._decode is not None:
            self._matchers[slot] = StopStringMatcher(self._params.stop_strings, self._decode)

    def newest(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest token of the first rows and its position in the whole sequence."""
        count = self.num_tokens[:num_rows]
        return self.tokens[np.arange(num_rows), count - 1], self.prompt_lengths[:num_rows] + count - 1

    def append(self, draw: Draw) -> list[int]:
        """Add the tokens drawn for the first rows; returns the rows that ended with them."""
        num_rows = len(draw.tokens)
        rows, count = np.arange(num_rows), self.num_tokens[:num_rows]
        self.tokens[rows, count] = draw.tokens
        self._logprobs[rows, count] = draw.logprobs
        count += 1
        for row, support in enumerate(draw.support or ()):
            self._supports[row].append(support)
        ended = np.isin(draw.tokens, self._stops) | (count == self._params.max_new_tokens)
        if self._decode is not None:
            self._matched[:num_rows] = [self._completes(row) for row in range(num_rows)]
            ended |= self._matched[:num_rows] & (count >= self._params.min_new_tokens)
        return np.flatnonzero(ended).tolist()

    def _completes(self, row: int) -> bool:
        """Whether a row's last token made some stop string whole."""
        matcher = self._matchers[row]
        return matcher is not None and matcher.completed_by_last(self.tokens[row, : self.num_tokens[row]].tolist())

    def completion(self, row: int) -> Completion:
        """A row's sequence so far."""
        num_tokens = self.num_tokens[row]
        found = Completion(
            index=int(self.indices[row]),
            tokens=self.tokens[row, :num_tokens].tolist(),
            logprobs=self._logprobs[row, :num_tokens].tolist(),
            support=list(self._supports[row]) if self._params.truncates else None,
        )
        conclude(found, self._params, matched=bool(self._matched[row]))
        return found

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target`."""
        for array in (self.indices, self.prompt_lengths, self.num_tokens, self.tokens, self._logprobs):
            array[target] = array[source]
        self._supports[target] = self._supports[source]
        self._matchers[target] = self._matchers[source]
