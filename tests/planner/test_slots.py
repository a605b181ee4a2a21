"""Slots are searched where not all completions fit at a time, as many as fit are chosen; else nothing changes."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
from tiny_steps import GIB, device, llama, step, texts

from meshift.layout.layout import Layout, Placement
from meshift.planner.candidates import Problem
from meshift.planner.checking import most_slots, shortages, would_fit
from meshift.planner.evaluate import evaluate, peak_bytes
from meshift.planner.explain import explanation
from meshift.planner.memory import Machine
from meshift.planner.planning import make_plan
from meshift.planner.shortage import shortage
from meshift.planner.timeline import Spot, excess_bytes, step_seconds
from meshift.planner.tuning import WORTHWHILE, better_slots
from meshift.planner.uses import Use
from meshift.planner.written import placements_of

DRAWN = Use("actor", "generate")
LONG = texts(num_prompts=64, completion=300.0, most=1500)
"""So long that keys and values of all are more than the model."""


def long_step(**changes):
    """GRPO whose passes need little."""
    return step("grpo", given=replace(LONG, **changes), gradient_checkpointing=True, logits_chunk=64)


def all_spots(problem, use):
    """Every layout with every number of slots that differs in memory, wherever it can be."""
    candidates = [
        problem.candidate(use, layout, slots)
        for layout in problem.layouts(use)
        for slots in (range(8, 65, 8) if use == DRAWN else (None,))
    ]
    return [Spot(one, first) for one in candidates for first in problem.offsets(one.size)]


def fastest(problem):
    """By counting through: seconds and slots."""
    best = float("inf"), 0
    for spots in product(*(all_spots(problem, use) for use in problem.uses)):
        choice = dict(zip(problem.uses, spots, strict=True))
        seconds = step_seconds(problem, choice)
        if seconds < best[0] and excess_bytes(problem, choice) == 0:
            best = seconds, choice[DRAWN].candidate.slots
    return best


@pytest.mark.parametrize(("memory", "all_fit"), [(0.75, False), (1.15, True)])
def test_the_plan_is_as_fast_as_the_best_that_counting_through_all_slots_finds(memory, all_fit):
    """Where a layout has room for all of them, it may be the plan: fewer on more devices are hardly faster."""
    given, hardware = long_step(), device(memory)
    planned = make_plan(given, hardware, 2, seconds=3)
    assert planned.lacking == 0
    seconds, slots = fastest(Problem(given, hardware, 2))
    found = planned.settings[-1].seconds if planned.settings else planned.seconds
    assert found <= seconds * 1.02
    assert 0 < slots < 64
    assert all_fit == ("num_slots" not in planned.values["actor"])
    assert all_fit or 0 < planned.values["actor"]["num_slots"] < 64


@pytest.mark.parametrize("memory", [1.25, 1.35, 1.7])
def test_slots_that_no_candidate_has_would_leave_nothing_to_prove(memory):
    """On a processor nothing but slots gives way; those found in steps of eight may beat every candidate."""
    planned = make_plan(long_step(), replace(device(memory), machine=Machine(packs=True)), 1, seconds=1)
    assert planned.lacking == 0
    assert planned.gap < 0.01


def test_a_plan_would_be_proven_that_a_few_slots_fewer_beat():
    """An eighth or a quarter fewer may be all that it takes, though they spare but a twentieth of a device."""
    problem = Problem(long_step(), device(1.6), 1)
    every, most, fewer, half, *_ = problem.slot_choices(DRAWN, Layout())
    assert (every, most, fewer, half) == (None, 56, 48, 32)
    needed = [problem.candidate(DRAWN, Layout(), slots).working["rollout"] for slots in (every, most, fewer)]
    for more, less in pairwise(needed):
        assert 0.05 <= (more - less) / problem.capacity < 0.2


def test_what_is_chosen_fits_by_the_independent_count_and_is_explained():
    planned = make_plan(long_step(), device(1.3), 1, seconds=2)
    slots = planned.choice[DRAWN].candidate.slots
    placements = placements_of(planned.problem, planned.choice)
    hardware = planned.problem.hardware
    assert peak_bytes(planned.step, hardware, placements)["rollout"] <= hardware.usable
    assert peak_bytes(planned.problem.step, hardware, placements)["rollout"] > hardware.usable
    assert planned.seconds == max(event.end for event in evaluate(planned.step, hardware, placements))
    (sentence,) = [one for one in explanation(planned) if "sequences at a time" in one]
    assert f"rollout decodes {slots} sequences at a time" in sentence
    assert "of 64 that generation.num_slots=64 allows" in sentence


def test_nothing_changes_where_all_fit_at_once():
    given = step("grpo")
    problem = Problem(given, device(), 4)
    assert [one.slots for one in problem.candidates[DRAWN] if one.slots is not None and one.size == 4] == []
    planned = make_plan(given, device(), 4, seconds=2)
    assert "num_slots" not in planned.values["actor"]
    assert planned.step == planned.problem.step
    assert not [one for one in planned.settings if one.key == "num_slots"]


def test_fewer_slots_are_whole_steps_of_memory_and_below_what_a_data_rank_has():
    problem = Problem(step("grpo", given=texts(num_prompts=100)), device(), 4)
    assert list(problem.fewer_slots(DRAWN, Layout())) == [56, 48, 32, 24, 16, 8]
    assert list(problem.fewer_slots(DRAWN, Layout(data=4))) == [16, 8]  # of 25 sequences
    assert list(problem.fewer_slots(DRAWN, Layout(pipeline=2))) == [48, 32, 16]  # two sessions of a half each
    assert list(problem.fewer_slots(Use("actor", "train"), Layout())) == []


@pytest.mark.parametrize("slots", [1, 8, 9, 64, 100])
def test_the_most_slots_that_fit_are_those_of_trying_all(slots):
    for most in range(slots + 1):
        tried = [count for count in range(8, slots, 8) if count <= most]
        assert most_slots(slots, lambda count, most=most: count <= most) == max(tried, default=None)


PLACED = {
    "actor": {"train": Placement.parse("0", "d1t1p1"), "generate": Placement.parse("0", "d1t1p1")},
    "reference": {"infer": Placement.parse("0", "d1t1p1")},
}


@pytest.mark.parametrize("memory", [1.5, 2.0, 8.0])
def test_more_slots_than_the_config_has_are_advised_as_far_as_they_fit_and_gain(memory):
    given, hardware = long_step(num_prompts=200), device(memory)

    def seconds(count):
        return max(event.end for event in evaluate(given.with_slots("actor", count), hardware, PLACED))

    counts = [count for count in (*range(8, 200, 8), 200) if count > 16]
    fitting = {
        count: seconds(count)
        for count in counts
        if max(peak_bytes(given.with_slots("actor", count), hardware, PLACED).values()) <= hardware.usable
    }
    given = given.with_slots("actor", 16)
    (found,) = better_slots(given, hardware, PLACED)
    assert (found.role, found.key) == ("actor", "num_slots")
    assert found.value == min(fitting, key=lambda count: (fitting[count], count))
    assert found.seconds == pytest.approx(fitting[found.value])
    assert found.seconds < seconds(16) * (1 - WORTHWHILE)


def test_a_plan_by_hand_that_lacks_memory_for_drawing_is_told_the_most_slots_that_fit():
    given, hardware = long_step(), device(1.5)
    (sentence,) = shortages(given, hardware, PLACED)
    assert "keys and values of 64 slots)" in sentence
    advice = would_fit(given, hardware, PLACED)
    name, _, slots = advice[0].partition("=")
    assert name == "actor: num_slots"
    fewer, more = (peak_bytes(given.with_slots("actor", int(slots) + n), hardware, PLACED) for n in (0, 8))
    assert max(fewer.values()) <= hardware.usable < max(more.values())


def test_advice_that_another_makes_needless_would_be_given():
    """Half of a micro-batch is enough: a quarter is no more advice; nor all roles away where some are enough."""
    given = step("grpo", given=texts(num_prompts=64, completion=60.0, most=120))
    given = given.with_passes(["actor"], max_tokens_per_micro_batch=4096)
    place = {role: {kind: Placement.parse("0-1", "d2t1p1") for kind in kinds} for role, kinds in PLACED.items()}
    most = max(peak_bytes(given, device(64), place).values())
    advice = would_fit(given, device(0.999 * most / GIB), place)
    assert sum("max_tokens_per_micro_batch" in one for one in advice) == 1
    assert sum("gradient_checkpointing" in one for one in advice) == 1
    assert sum("offload" in one for one in advice) == 1


def test_slots_are_no_advice_where_something_else_is_short():
    large = llama(layers=16)
    given = step("grpo", actor=large)
    assert not [one for one in would_fit(given, device(1.0), PLACED) if "slots" in one]
    planned = make_plan(given, device(0.6), 1, seconds=2)
    assert planned.lacking > 0
    assert not [one for one in (*planned.changes, *shortage(planned)) if "slots" in one]


def test_a_processor_is_not_relieved_by_moving_roles_to_its_own_memory():
    """That fits nothing; fewer slots do."""
    processor = replace(device(1.45), machine=Machine(packs=True))
    planned = make_plan(long_step(), processor, 1, seconds=2)
    assert planned.lacking == 0
    assert not any(role.offloaded for role in planned.problem.step.roles.values())
    assert planned.values["actor"]["num_slots"] < 64
