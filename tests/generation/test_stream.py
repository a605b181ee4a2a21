"""A completion read token by token is the one that `generate` gives."""

import copy

import pytest
import torch

from meshift.errors import DataError
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams

PROMPT = [3, 1, 4, 1, 5]


def test_a_stream_would_draw_other_tokens_than_generate(model):
    for params in (SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=30, stop_token_ids=(1, 9, 40))):
        engine = GenerationEngine(model, num_slots=1)
        whole = engine.generate([PROMPT], params, seed=3, first_index=7)[0]
        grown = [copy.deepcopy(c) for c in engine.stream(PROMPT, params, seed=3, index=7)]
        assert [c.tokens for c in grown] == [whole.tokens[: i + 1] for i in range(len(whole.tokens))]
        assert grown[-1] == whole


def test_a_stream_that_is_left_early_would_spoil_the_next(model):
    engine, params = GenerationEngine(model), SamplingParams(max_new_tokens=8)
    first = engine.stream(PROMPT, params, seed=0)
    next(first)
    next(first)
    first.close()
    assert not torch.is_inference_mode_enabled()
    expected = GenerationEngine(model).generate([PROMPT[:2]], params, seed=0)[0]
    assert list(engine.stream(PROMPT[:2], params, seed=0))[-1] == expected


def test_a_prompt_without_room_would_be_found_only_while_streaming(model):
    stream = GenerationEngine(model).stream([1] * 125, SamplingParams(max_new_tokens=8), seed=0)
    with pytest.raises(DataError, match="leave room"):
        next(stream)
