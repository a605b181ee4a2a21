"""The arithmetic of the hardware's limits, against sums written out by hand and parameter counts of the model."""

import pytest
from transformers import LlamaConfig

from benchmarks.limits import (
    Limits,
    Shape,
    decode_seconds,
    forward_flops,
    generation_seconds,
    training_seconds,
)
from meshift.models.hf.families import read_config
from meshift.models.shards import num_parameters, shard_table

SHAPE = Shape(
    hidden_size=8, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=32
)
LIMITS = Limits(gemm={8: 5.0, 64: 100.0, 512: 400.0}, train_gemm=300.0, bandwidth=50.0, num_bytes=2)


def test_parameters_are_those_of_the_shard_table():
    norms = (2 * SHAPE.num_layers + 1) * SHAPE.hidden_size
    raw = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    raw.architectures = ["LlamaForCausalLM"]
    assert Shape.of(raw.to_dict()) == SHAPE
    whole = num_parameters(shard_table(read_config(raw.to_dict(), "a test", None), "lm"))
    assert SHAPE.num_body + SHAPE.num_head + norms == whole


def test_a_small_batch_is_held_against_the_arithmetic_units_not_against_slow_kernels():
    assert LIMITS.gemm_rate(1) == LIMITS.gemm_rate(64) == 100.0
    assert LIMITS.gemm_rate(511) == 100.0
    assert LIMITS.gemm_rate(4096) == 400.0


def test_forward_flops_are_a_naive_count():
    lengths, num_read = [3, 5], 4
    naive = 0
    for length in lengths:
        for position in range(length):
            naive += 2 * sum(a * b for a, b in SHAPE.matrices) * SHAPE.num_layers
            naive += 2 * 2 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim * (position + 0.5)
    naive += 2 * num_read * SHAPE.vocab_size * SHAPE.hidden_size
    naive -= 2 * (sum(lengths) - num_read) * sum(a * b for a, b in SHAPE.matrices[1:])  # of the last layer
    assert forward_flops(SHAPE, lengths, num_read) == pytest.approx(naive)


def test_a_beginning_in_common_runs_once():
    """Four sequences of 5 that begin with the same 3: as one of 3, and 2 more of each that see the 3 as well."""
    shared = forward_flops(SHAPE, [5] * 4, 8, [(3, 3)])
    heads = 2 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim
    naive = forward_flops(SHAPE, [3], 0) + 4 * (forward_flops(SHAPE, [2], 2) + heads * (5**2 - 3**2 - 2**2))
    assert shared == pytest.approx(naive)


def test_training_costs_three_forwards_at_its_own_rate():
    assert training_seconds(SHAPE, LIMITS, [4], 4) == pytest.approx(3 * forward_flops(SHAPE, [4], 4) / 300.0)


def test_one_sequence_is_bound_by_the_bandwidth_and_many_by_the_arithmetic():
    numbers = SHAPE.num_body + SHAPE.num_head
    assert decode_seconds(SHAPE, LIMITS, [0]) == pytest.approx(2 * numbers / 50.0)
    assert decode_seconds(SHAPE, LIMITS, [0] * 64) == pytest.approx(2 * numbers * 64 / 100.0)


def test_the_cache_is_read_in_every_decode_step():
    more = decode_seconds(SHAPE, LIMITS, [10]) - decode_seconds(SHAPE, LIMITS, [0])
    keys_and_values = 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim
    assert more == pytest.approx(10 * keys_and_values * 2 / 50.0)


def test_generation_is_its_prompts_and_a_decode_step_for_every_token_but_the_first():
    alone = generation_seconds(SHAPE, LIMITS, [4], [1])
    assert alone == pytest.approx(forward_flops(SHAPE, [4], 1) / 100.0)
    two = generation_seconds(SHAPE, LIMITS, [4, 4], [1, 3])
    expected = forward_flops(SHAPE, [4, 4], 2) / 100.0
    expected += decode_seconds(SHAPE, LIMITS, [5]) + decode_seconds(SHAPE, LIMITS, [6])
    assert two == pytest.approx(expected)
