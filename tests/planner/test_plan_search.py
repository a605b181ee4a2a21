"""Searches find what counting through finds; bounds hold; plans keep to devices, order and memory."""

from dataclasses import replace
from itertools import combinations

import pytest
from tiny_steps import device, llama, problem, step, texts

from meshift.config.plan import PPOPlan
from meshift.config.sections import LoraConfig, TrainableConfig
from meshift.layout.layout import Layout, Placement
from meshift.models.hf.adapter_targets import adapter_for
from meshift.planner.bounds import least_seconds, reduced
from meshift.planner.brute_force import all_spots, brute_force
from meshift.planner.candidates import Problem
from meshift.planner.evaluate import evaluate, peak_bytes
from meshift.planner.prove import has_solver, prove
from meshift.planner.search import score, search
from meshift.planner.strategies import STRATEGIES
from meshift.planner.timeline import peak_bytes as modelled_bytes
from meshift.planner.timeline import step_seconds, timeline
from meshift.planner.written import placements_of, plan_values

SMALL = {
    "dpo on 3": lambda: problem("dpo", 3),
    "dpo on 8": lambda: problem("dpo", 8),
    "dpo of a model that fits on several only": lambda: problem("dpo", 4, device(memory=0.55)),
    "dpo on two hosts": lambda: problem("dpo", 4, device(per_host=2)),
    "grpo on 3": lambda: problem("grpo", 3),
    "grpo on 4": lambda: problem("grpo", 4, sharding=False),
    "grpo with long answers": lambda: problem("grpo", 4, given=texts(completion=400.0, most=1024), sharding=False),
    "grpo on two hosts": lambda: problem("grpo", 4, device(per_host=2), sharding=False),
    "grpo in little memory": lambda: problem("grpo", 4, device(memory=0.8), sharding=False),
    "ppo on 2": lambda: problem("ppo", 2),
    "ppo of a large critic": lambda: problem("ppo", 2, critic=llama(hidden=2048)),
}


@pytest.fixture(scope="module", params=list(SMALL))
def counted(request):
    """A small problem and its best plan, found by counting through."""
    given = SMALL[request.param]()
    best = brute_force(given)
    assert best is not None
    return given, best[0]


def test_local_search_is_nearly_as_good_as_counting_through(counted):
    given, best = counted
    found = score(given, search(given, seconds=3))
    assert found.excess == 0
    assert best <= found.seconds <= 1.02 * best


@pytest.mark.skipif(not has_solver(), reason="OR-Tools is not installed")
def test_what_is_proven_optimal_is_what_counting_through_finds(counted):
    given, best = counted
    proof = prove(given, search(given, seconds=0.5), seconds=20)
    assert proof.proven
    assert proof.seconds == pytest.approx(best, rel=1e-3)
    assert 0.998 * best < proof.bound <= best * (1 + 1e-9)


def test_no_plan_beats_the_bounds_that_need_no_solver(counted):
    given, best = counted
    every = {use: [spot.candidate for spot in all_spots(given, use)] for use in given.uses}
    assert least_seconds(given, every) <= best
    assert least_seconds(given, given.candidates) <= best * (1 + 1e-9)


def test_layouts_that_are_left_out_are_in_no_best_plan(counted):
    given, best = counted
    left = reduced(given, given.candidates, best)
    assert all(left.values())
    smaller = sum(map(len, left.values())), sum(len(list(given.all_candidates(use))) for use in given.uses)
    assert smaller[0] <= smaller[1]


def test_calls_do_not_share_a_device_at_a_time_and_wait_for_what_they_read(counted):
    given, _ = counted
    bars = timeline(given, search(given, seconds=0.5))
    for one, other in combinations(bars, 2):
        if any(a.meets(b) for a in one.spots for b in other.spots):
            assert one.end <= other.start or other.end <= one.start
    for bar in bars:
        for i in set(bar.op.waits) - set(bar.op.streams):
            assert bars[i].end <= bar.start


def test_playing_a_plan_through_takes_the_time_that_the_search_said(counted):
    given, _ = counted
    choice = search(given, seconds=0.5)
    events = evaluate(given.step, given.hardware, placements_of(given, choice))
    assert max(event.end for event in events) == pytest.approx(step_seconds(given, choice), rel=0.03)
    ends = {bar.op.name: bar.end for bar in timeline(given, choice) if bar.op.kind == "call"}
    assert {event.name: event.end for event in events if event.kind == "call"} == pytest.approx(ends, rel=0.03)


def test_memory_counted_device_by_device_is_what_the_search_allowed_or_less(counted):
    given, _ = counted
    choice = search(given, seconds=0.5)
    exact, modelled = (
        peak_bytes(given.step, given.hardware, placements_of(given, choice)),
        modelled_bytes(given, choice),
    )
    grains = len(given.uses) + 1
    for name, most in modelled.items():
        assert exact[name] <= most + 1
        assert exact[name] >= 0.75 * most - grains * 0.01 * given.capacity
        assert exact[name] <= given.capacity


def test_the_same_seed_finds_the_same_plan():
    found = [search(problem("grpo", 4), seconds=60, seed=1) for _ in range(2)]
    assert found[0] == found[1]


def test_no_strategy_by_hand_is_faster_than_the_plan():
    given = problem("ppo", 8)
    ours = score(given, search(given, seconds=4)).seconds
    for name, make in STRATEGIES.items():
        choice = make(given)
        assert choice is not None, name
        assert score(given, choice).excess > 0 or score(given, choice).seconds >= ours * (1 - 1e-9), name
    assert STRATEGIES["split by role"](problem("ppo", 2)) is None


def test_readings_begin_before_generation_ends_where_they_are_elsewhere():
    given = problem("grpo", 4, sharding=False)
    apart = {
        use: next(
            spot for spot in all_spots(given, use) if spot.candidate.layout == layout and spot.first == first
        )
        for use, layout, first in zip(
            given.uses, (Layout(data=2), Layout(data=2), Layout(data=2, tensor=2)), (0, 2, 0), strict=True
        )
    }
    bars = {bar.op.name: bar for bar in timeline(given, apart)}
    assert bars["reference"].start < bars["rollout"].end < bars["reference"].end
    alone = Problem(step("grpo"), device(), 4, streaming=False, sharding=False)
    late = {bar.op.name: bar for bar in timeline(alone, apart)}
    assert late["reference"].start == late["rollout"].end


def test_a_role_that_is_offloaded_leaves_room_and_takes_time():
    given = step("grpo")
    roles = {
        **given.roles,
        "reference": type(given.roles["reference"])(**{**vars(given.roles["reference"]), "offloaded": True}),
    }
    away = Problem(type(given)(roles=roles, calls=given.calls), device(), 2, sharding=False)
    here = Problem(given, device(), 2, sharding=False)
    choice = {use: all_spots(here, use)[-1] for use in here.uses}
    assert step_seconds(away, choice) > step_seconds(here, choice)
    assert modelled_bytes(away, choice)["train_actor"] < modelled_bytes(here, choice)["train_actor"]
    assert modelled_bytes(away, choice)["reference"] == modelled_bytes(here, choice)["reference"]


def test_a_plan_is_written_as_a_run_reads_it():
    given = problem("ppo", 4)
    choice = search(given, seconds=1)
    written = PPOPlan.model_validate(plan_values(given, choice))
    read = {
        role: {kind: Placement.parse(p.mesh, p.layout) for kind, p in plan.placements.items()}
        for role, plan in written.roles.items()
    }
    assert read == placements_of(given, choice)


def test_devices_without_work_get_no_number():
    given = problem("dpo", 4, sharding=False)
    apart = {
        use: next(spot for spot in all_spots(given, use) if spot.candidate.size == 1 and spot.first == first)
        for use, first in zip(given.uses, (1, 3), strict=True)
    }
    meshes = {str(p.mesh) for kinds in placements_of(given, apart).values() for p in kinds.values()}
    assert meshes == {"0", "1"}


def test_adapters_that_a_reference_follows_are_not_cut_into_rows():
    """A config with such a plan is refused: sums of matrices and their adapters need both whole."""
    given = TrainableConfig(lora=LoraConfig(rank=4))
    adapted = replace(llama(), adapter=adapter_for(llama(), given.lora, 0))
    for model, moves, offered in ((adapted, True, False), (adapted, False, True), (llama(), True, True)):
        small = step("dpo", actor=model)
        small = small if moves else replace(small, mixings=())
        found = Problem(small, device(), 4)
        sharded = {use.role for use in found.uses for layout in found.layouts(use) if layout.sharded}
        assert sharded == ({"actor", "reference"} if offered else {"reference"})
