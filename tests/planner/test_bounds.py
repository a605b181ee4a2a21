"""No bound rules out a plan that there is: of random small problems every plan passes every cut.

A plan is held against them by itself, with its own seconds as what is known, so that a cut that is a little too
sharp anywhere fails, and not only one that takes the best plan away.
"""

from dataclasses import replace
from random import Random

import pytest
from tiny_steps import device, llama, problem, step, texts

from meshift.layout.layout import Layout
from meshift.planner.bounds import ended_before, least_seconds, reduced
from meshift.planner.brute_force import all_spots, brute_force
from meshift.planner.candidates import Problem
from meshift.planner.prove import Limits, _Model, has_solver, prove
from meshift.planner.search import score, search
from meshift.planner.timeline import Spot, timeline
from meshift.planner.workload import Mixing

NUM_PROBLEMS, NUM_PLANS, NUM_SOLVED = 10, 150, 6
NEVER = float("inf")


def drawn_problem(seed):
    """PPO or GRPO of a random size, on random devices of one host or of several."""
    draw = Random(seed)
    num_devices = draw.choice((3, 4, 6, 8))
    per_host = draw.choice([n for n in (2, 3, 4, 8) if num_devices % n == 0 and n < num_devices] or [8])
    given = device(memory=draw.choice((0.4, 0.7, 1.0, 4.0)), per_host=draw.choice((8, per_host)))
    sizes = {"actor": llama(hidden=draw.choice((512, 1024))), "critic": llama(hidden=draw.choice((512, 2048)))}
    lengths = texts(completion=draw.choice((50.0, 400.0)), most=1024)
    kind = draw.choice(("ppo", "grpo", "ppo"))
    made = step(kind, given=lengths, **(sizes if kind == "ppo" else {"actor": sizes["actor"]}))
    away = draw.choice(([], [], ["reference"], list(made.roles)))
    return Problem(made.with_offloaded(away), given, num_devices)


def drawn_plans(given, draw, count):
    """Random plans that fit, half of them with a disjoint or a shared mesh for all uses of a role."""
    spots = {use: all_spots(given, use) for use in given.uses}
    found = []
    for _ in range(20 * count):
        choice = {use: draw.choice(spots[use]) for use in given.uses}
        if draw.random() < 0.5:
            for use in given.uses:
                home = choice[given.home(use.role)]
                choice[use] = next((one for one in spots[use] if one.is_same(home)), choice[use])
        if score(given, choice).excess == 0:
            found.append(choice)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module", params=range(NUM_PROBLEMS))
def drawn(request):
    given = drawn_problem(request.param)
    return given, drawn_plans(given, Random(request.param), NUM_PLANS)


def test_most_random_problems_have_plans():
    counts = [len(drawn_plans(drawn_problem(seed), Random(seed), 3)) for seed in range(NUM_PROBLEMS)]
    assert sum(count > 0 for count in counts) >= 0.7 * NUM_PROBLEMS


def test_no_plan_is_faster_than_the_bound_of_its_own_candidates(drawn):
    given, plans = drawn
    for choice in plans:
        alone = {use: (spot.candidate,) for use, spot in choice.items()}
        assert least_seconds(given, alone) <= score(given, choice).seconds * (1 + 1e-9)


def test_candidates_of_a_plan_are_left_where_its_own_seconds_are_allowed(drawn):
    given, plans = drawn
    every = {use: tuple(given.all_candidates(use)) for use in given.uses}
    for choice in plans[:20]:
        left = reduced(given, every, score(given, choice).seconds)
        for use, spot in choice.items():
            assert spot.candidate in left[use]


def test_calls_that_are_said_to_be_over_are(drawn):
    given, plans = drawn
    over = ended_before(given)
    for choice in plans:
        bars = timeline(given, choice)
        assert all(bars[i].end <= bars[j].start + 1e-9 for j in range(len(bars)) for i in over[j])


@pytest.mark.skipif(not has_solver(), reason="OR-Tools is not installed")
def test_the_solver_s_model_has_every_plan_with_its_seconds(drawn):
    """With all candidates and meshes held to the plan's, something is left, that takes no longer."""
    given, plans = drawn
    for choice in plans[:NUM_SOLVED]:
        seconds = score(given, choice).seconds
        alone = {use: (spot.candidate,) for use, spot in choice.items()}
        model = _Model(given, alone, choice, seconds, Limits(10**9, NEVER))
        for use, spot in choice.items():
            model.model.Add(model.first[use] == spot.first)
        found, bound = model.solve(10, 1)
        assert found is not None
        assert bound <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("layout", [Layout(data=4), Layout(data=2, tensor=2)])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_plan_of_one_placement_is_left_where_memory_is_just_enough(kind, layout):
    """Weights that two uses of a role share are there once: a bound that counts copies would cut this plan."""
    model = llama(layers=8)
    made = step(kind, actor=model, critic=model, given=texts(num_prompts=8, completion=16.0, most=32))

    def of(memory):
        given = Problem(made, device(memory=memory), 4)
        choice = {use: Spot(given.candidate(use, layout), 0) for use in given.uses}
        return given, choice, score(given, choice)

    memory = 16.0
    while of(0.995 * memory)[2].excess == 0:
        memory *= 0.995
    given, choice, found = of(memory)
    copies = sum(spot.candidate.copy for use, spot in choice.items() if use != given.home(use.role))
    assert copies > 0.05 * given.capacity
    alone = {use: (spot.candidate,) for use, spot in choice.items()}
    assert all(reduced(given, alone, found.seconds).values())
    if has_solver():
        assert _Model(given, alone, choice, found.seconds, Limits(10**9, NEVER)).solve(10, 1)[0] is not None


def test_the_dearest_move_of_a_layout_is_that_of_all_pairs():
    made = step("ppo")
    averaged = replace(made, mixings=(Mixing(source="actor", target="reference", every=2),))
    given = Problem(averaged, device(per_host=2), 4)
    fitting = {use: list(given.all_candidates(use)) for use in given.uses}
    for use in given.uses:
        kept = {}
        ops = [op for op in given.ops if op.kind != "call" and use in op.uses]
        for one in fitting[use]:
            expected = 0.0
            for op in ops:
                is_source = op.uses[0] == use
                others = fitting[op.uses[1] if is_source else op.uses[0]]
                pairs = [(one, other) if is_source else (other, one) for other in others]
                expected += max(given.moving_seconds(op, a.layout, b.layout, None) for a, b in pairs)
            assert given._most_moving(use, one, fitting, kept) == expected


def test_a_plan_that_no_candidate_is_as_fast_as_is_proven_by_that(monkeypatch):
    given = problem("grpo", 2, device(memory=16))
    best = search(given, seconds=0.5)
    slowest = {
        use: (max(found, key=lambda one: sum(one.seconds.values())),) for use, found in given.candidates.items()
    }
    monkeypatch.setattr(given, "candidates", slowest)
    proof = prove(given, best, seconds=1)
    assert (proof.choice, proof.seconds, proof.bound) == (best, score(given, best).seconds, proof.seconds)
    assert proof.proven == has_solver()


@pytest.mark.skipif(not has_solver(), reason="OR-Tools is not installed")
@pytest.mark.parametrize("seed", range(5))
def test_a_random_problem_s_best_plan_is_found_and_its_bound_is_no_higher(seed):
    draw = Random(100 + seed)
    memory = device(memory=draw.choice((0.6, 0.8, 1.0, 2.0)), per_host=draw.choice((2, 4, 8)))
    lengths = texts(completion=draw.choice((20.0, 100.0, 400.0)), most=1024)
    given = problem("grpo", draw.choice((2, 3, 4)), memory, given=lengths, sharding=draw.random() < 0.5)
    best = brute_force(given)
    if best is None:
        pytest.skip("nothing fits")
    proof = prove(given, search(given, seconds=0.3), seconds=20)
    assert proof.bound <= best[0] * (1 + 1e-9)
    assert proof.seconds == pytest.approx(best[0], rel=1e-3)
    left = reduced(given, {use: tuple(given.all_candidates(use)) for use in given.uses}, best[0])
    assert all(any(one == spot.candidate for one in left[use]) for use, spot in best[1].items())
