"""The arrays of live sequences: against a loop that appends to one completion at a time."""

import random

import numpy as np
import pytest

from meshift.generation.live import LiveRows
from meshift.generation.params import Completion, Request, SamplingParams
from meshift.generation.requests import conclude
from meshift.generation.sampler import Draw


def decode(tokens):
    return "".join("abcdef"[token] for token in tokens)


PARAMS = {
    "length": {},
    "stop tokens": {"stop_token_ids": (1, 4)},
    "early stops": {"stop_token_ids": (1, 4), "min_new_tokens": 3},
    "strings": {"stop_strings": ("ab", "fe")},
    "both": {"stop_strings": ("ab", "fe"), "stop_token_ids": (1,), "min_new_tokens": 2},
    "support": {"stop_token_ids": (1,), "top_k": 2},
}


def naive_append(completion, draw, row, params):
    completion.tokens.append(draw.tokens[row])
    completion.logprobs.append(draw.logprobs[row])
    if draw.support is not None:
        completion.support = [*(completion.support or []), draw.support[row]]
    text, before = decode(completion.tokens), decode(completion.tokens[:-1])
    matched = any(text.count(string) > before.count(string) for string in params.stop_strings)
    return conclude(completion, params, matched=matched)


@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS.keys())
def test_sequences_would_end_elsewhere_than_one_by_one(settings):
    params, chooser = SamplingParams(max_new_tokens=9, **settings), random.Random(0)
    live, expected = LiveRows(5, params, decode), []
    for slot in range(5):
        live.enter(slot, Request(tokens=[0] * (slot + 1), index=10 + slot))
        expected.append(Completion(index=10 + slot))
    for step in range(9):
        num_rows = len(expected)
        tokens = [chooser.randrange(6) for _ in range(num_rows)]
        support = [np.array([row, step]) for row in range(num_rows)] if params.truncates else None
        draw = Draw(tokens=tokens, logprobs=[-0.5 * token for token in tokens], support=support)
        ended = live.append(draw)
        assert ended == [row for row in range(num_rows) if naive_append(expected[row], draw, row, params)]
        newest, positions = live.newest(num_rows)
        assert newest.tolist() == tokens
        assert positions.tolist() == [c.index - 10 + len(c.tokens) for c in expected]
        for row in range(num_rows):
            assert repr(live.completion(row)) == repr(expected[row])
        for row in reversed(ended):
            last = expected.pop()
            if row < len(expected):
                expected[row] = last
                live.move(len(expected), row)
        if not expected:
            break
    assert not expected, "every sequence reached its length"
