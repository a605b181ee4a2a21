"""Steps with random lengths: against the plan's own seconds, against means, and against no randomness at all."""

import numpy as np
import pytest
from tiny_steps import device, llama, step, texts

from meshift.layout.layout import Placement
from meshift.planner.evaluate import evaluate
from meshift.planner.simulate import DrawnTexts, in_sentences, simulate

PLACED = {
    "actor": {"train": Placement.parse("0-1", "d2t1p1"), "generate": Placement.parse("0-3", "d4t1p1")},
    "critic": {"train": Placement.parse("2-3", "d1t2p1"), "infer": Placement.parse("2-3", "d1t2p1")},
    "reference": {"infer": Placement.parse("0-1", "d2t1p1")},
}


def seconds_of(given):
    return max(event.end for event in evaluate(given, device(), PLACED))


def test_steps_whose_lengths_cannot_vary_take_what_the_plan_takes():
    given = step("ppo", given=texts(completion=256.0, most=256))
    found = simulate(given, device(), PLACED, num_steps=3)
    assert found.seconds == pytest.approx([seconds_of(given)] * 3)
    assert found.even == pytest.approx(found.median)
    assert found.cost_of_tail == pytest.approx(0.0, abs=1e-9)


def test_random_steps_vary_around_the_plan_and_the_same_seed_draws_the_same():
    given = step("ppo")
    found = simulate(given, device(), PLACED)
    assert len(found.seconds) == 20
    assert found.median == pytest.approx(seconds_of(given), rel=0.15)
    assert 0.02 < np.std(found.seconds) / found.median < 0.3
    assert simulate(given, device(), PLACED) == found
    assert simulate(given, device(), PLACED, seed=1) != found


def test_a_long_tail_costs_more_than_a_short_one_at_the_same_mean():
    long, short = (simulate(step("ppo", given=texts(64, 64.0, most)), device(), PLACED) for most in (1024, 96))
    assert long.even == pytest.approx(short.even, rel=0.05)
    assert long.cost_of_tail > 1.5 * short.cost_of_tail > 0
    assert long.half < short.half < 1
    assert "20 steps with random lengths take" in next(in_sentences(long))


def test_means_of_what_is_drawn_are_those_of_the_texts():
    """As the truncated exponential has them, by inverting its distribution function."""
    given = texts(1, 64.0, 256)
    drawn = np.minimum(np.ceil(np.random.default_rng(0).exponential(1 / given.rate, 200_000)), 256)
    assert drawn.mean() == pytest.approx(64.5, abs=0.5)  # rounded up


def test_sessions_of_stages_share_out_what_is_drawn():
    fields = {name: getattr(texts(), name) for name in type(texts()).__dataclass_fields__}
    drawn = DrawnTexts(**fields, given=(3, 9, 1, 7, 5, 2, 8, 4, 6, 10))
    assert drawn.of_longest(5, 2) == [10, 7, 5, 3, 1]
    assert sorted(drawn.deal(10, 1, 0)[0]) == list(range(1, 11))


def test_nothing_is_random_where_nothing_is_generated():
    given = step("dpo", actor=llama())
    assert simulate(given, device(), {**PLACED, "actor": {"train": PLACED["actor"]["train"]}}) is None
