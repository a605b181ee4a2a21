"""The text of tokens that come one by one, in pieces that never end within a character.

Knows nothing of tokenizers beyond a `decode` callable.
"""

from collections.abc import Sequence

from meshift.generation.params import Decode
from meshift.generation.stop_strings import INCOMPLETE


class TextStream:
    """`grow(tokens)` gives the text that the newest tokens add; all pieces together are the text of all.

    Tokens are decoded in a window with the ones before them, since a token's text may depend on its left neighbour
    (leading spaces, bytes of one character). Text that ends in a character that is not whole yet
    is held back; if the tokens end there, it is dropped.
    """

    def __init__(self, decode: Decode):
        self._decode = decode
        self._window_start = 0
        self._window_done = 0  # tokens before this one have been given out
        self.text = ""

    def grow(self, tokens: Sequence[int]) -> str:
        """What the text has grown by since the last call; `tokens` are all of them so far."""
        given = self._decode(list(tokens[self._window_start : self._window_done]))
        new = self._decode(list(tokens[self._window_start :]))[len(given) :]
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._window_start, self._window_done = self._window_done, len(tokens)
        self.text += new
        return new

    def close(self, tokens: Sequence[int]) -> str:
        """What was held back and is whole; bytes of a character that was cut off are dropped."""
        given = self._decode(list(tokens[self._window_start : self._window_done]))
        rest = self._decode(list(tokens[self._window_start :]))[len(given) :].rstrip(INCOMPLETE)
        self._window_start = self._window_done = len(tokens)
        self.text += rest
        return rest
