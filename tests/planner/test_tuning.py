"""Other micro-batches are advised where they make the step faster and fit, and there alone."""

from dataclasses import replace

import pytest
from tiny_steps import device, step, texts

from meshift.layout.layout import Placement
from meshift.planner.evaluate import evaluate, peak_bytes
from meshift.planner.tuning import better_micro_batches

PLACED = {
    "actor": {"train": Placement.parse("0-1", "d1t1p2"), "generate": Placement.parse("0-1", "d2t1p1")},
    "reference": {"infer": Placement.parse("0-1", "d2t1p1")},
}


def with_tokens(given, tokens):
    roles = {
        name: replace(role, passes=role.passes.model_copy(update={"max_tokens_per_micro_batch": tokens}))
        for name, role in given.roles.items()
    }
    return replace(given, roles=roles)


def seconds_of(given, hardware):
    return max(event.end for event in evaluate(given, hardware, PLACED))


def test_what_is_advised_is_the_best_of_all_that_fit():
    """Layers that are dear to start ask for few passes; memory says how few."""
    given = with_tokens(step("grpo", given=texts(completion=128.0)), 512)
    for memory in (0.8, 1.0, 4.0):
        hardware = replace(device(memory), layer_delay=0.01)
        every = {n: with_tokens(given, n) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192)}
        fitting = {
            n: seconds_of(one, hardware)
            for n, one in every.items()
            if max(peak_bytes(one, hardware, PLACED).values()) <= hardware.usable
        }
        (found,) = better_micro_batches(given, hardware, PLACED)
        assert found.value == min(fitting, key=lambda n: (fitting[n], n))
        assert found.seconds == pytest.approx(fitting[found.value])
        assert found.role == "actor"


def test_nothing_is_advised_where_nothing_is_gained():
    one_pass = with_tokens(step("grpo", given=texts(num_prompts=4)), 100_000)
    assert better_micro_batches(one_pass, replace(device(), layer_delay=0.01), PLACED) == []
