"""Sampling parameters: what is refused, and by which name."""

import pytest

from meshift.errors import ConfigError
from meshift.generation.params import SamplingParams


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 9),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("stop_token_ids", (3, -1)),
        ("stop_strings", ("",)),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"`{key}` is "):
        SamplingParams(**{"max_new_tokens": 8, key: value})
