"""Finds stop strings in text that grows token by token, decoding only its tail.

Knows nothing of tokenizers beyond a `decode` callable.
"""

from collections.abc import Sequence

from meshift.generation.params import Decode

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are not yet a whole character."""


class StopStringMatcher:
    """The decoded end of one sequence; `completed_by_last` after every new token, the prompt not included.

    Tokens are decoded in a window with the ones before them, and the text of the new ones is what the
    window grew by, since a token's text may depend on its left neighbour (leading spaces, bytes of one
    character). A window stays open until its text ends in a whole character.
    """

    def __init__(self, stop_strings: Sequence[str], decode: Decode):
        self._stop_strings = tuple(stop_strings)
        self._decode = decode
        self._keep = max(len(string) for string in stop_strings)
        self._settled = ""  # the last characters whose tokens are done with
        self._window_start = 0
        self._window_done = 0  # tokens before this one are in `_settled`
        self._window_text = ""  # text of tokens[_window_start:_window_done]

    def completed_by_last(self, tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens` (all generated so far) made some stop string whole."""
        text = self._decode(list(tokens[self._window_start :]))
        new = text[len(self._window_text) :]
        found = any(string in self._before(string) + new for string in self._stop_strings)
        if new and not new.endswith(INCOMPLETE):
            self._settle(new, len(tokens), tokens)
        return found

    def _before(self, string: str) -> str:
        """The settled text that an occurrence of `string` ending in new text can reach back into."""
        reach = len(string) - 1
        return self._settled[-reach:] if reach else ""

    def _settle(self, new: str, num_tokens: int, tokens: Sequence[int]) -> None:
        self._settled = (self._settled + new)[-self._keep :]
        self._window_start, self._window_done = self._window_done, num_tokens
        self._window_text = self._decode(list(tokens[self._window_start : num_tokens]))
