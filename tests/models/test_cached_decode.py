"""Every family through the generation engine: greedy tokens with our cache against `transformers` with its own."""

import pytest
import torch
from family_variants import EACH_FAMILY

from meshift.generation.engine import GenerationEngine
from meshift.generation.fused import FusedDecoder
from meshift.generation.params import SamplingParams
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.load import load_model

END = 2
PROMPTS = [list(range(3, 22)), [7], [50, 4, 33, 9, 12]]


@pytest.mark.parametrize("name", [*EACH_FAMILY, "llama", "mistral-full", "phi3", "gemma3"])
def test_greedy_tokens_would_differ_from_those_of_transformers(saved, name):
    params = SamplingParams(max_new_tokens=20, temperature=0.0, stop_token_ids=(END,))
    found = GenerationEngine(load_model(saved(name).folder), num_slots=2).generate(PROMPTS, params, seed=0)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        expected = saved(name).model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert completion.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_bfloat16_would_err_more_in_generation_than_in_training(saved, name):
    """Both against the same weights in fp32: the fused pass rounds less often than the decoder, never more."""
    rounded = load_model(saved(name).folder, dtype=torch.bfloat16)
    exact = load_model(saved(name).folder, dtype=torch.bfloat16).float()
    lengths = [19, 1, 5]
    inputs = torch.randint(3, 60, (25,)), packed_positions(lengths), PackedAttention(lengths)
    fused = FusedDecoder(rounded)
    fused.refresh()
    with torch.inference_mode():
        truth = exact.head(exact(*inputs))
        plain, ours = rounded.head(rounded(*inputs)), fused.logits(fused.forward(*inputs))
    plain, ours = ((logits - truth).abs().mean() for logits in (plain, ours))
    assert ours < 1.2 * plain
