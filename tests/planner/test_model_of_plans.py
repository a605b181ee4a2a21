"""The model that plans are searched in has the plans that a run can have: meshes, stages, offloading, streams."""

from dataclasses import replace

import pytest
from test_profile import shared
from tiny_steps import device, llama, step, texts

from meshift.layout.layout import Layout, Placement
from meshift.planner.brute_force import brute_force
from meshift.planner.candidates import Problem
from meshift.planner.checking import shortages, would_fit
from meshift.planner.evaluate import evaluate, peak_bytes
from meshift.planner.memory import Machine, Memory
from meshift.planner.prove import has_solver, prove
from meshift.planner.search import score, search
from meshift.planner.timeline import Spot, step_seconds, timeline
from meshift.planner.uses import Use
from meshift.planner.written import placements_of


def placed(given, **where):
    """A choice of layouts and first devices, as `actor_train=("d1t3p1", 2)`."""
    return {
        use: Spot(
            given.candidate(use, Layout.parse(where[f"{use.role}_{use.kind}"][0])),
            where[f"{use.role}_{use.kind}"][1],
        )
        for use in given.uses
    }


def test_meshes_of_one_host_begin_at_any_device():
    """Three and two of five devices share no device, and only one of them begins at a multiple of its size."""
    given = Problem(step("ppo", given=texts(num_prompts=100)), device(), 5)
    apart = placed(
        given,
        actor_generate=("d1t2p1", 3),
        reference_infer=("d2t1p1", 1),
        critic_infer=("d1t1p1", 0),
        actor_train=("d1t3p1", 2),
        critic_train=("d1t1p2", 0),
    )
    by_hand = step_seconds(given, apart)
    proof = prove(given, search(given, seconds=0.5), seconds=8)
    assert proof.bound <= by_hand * (1 + 1e-9)
    if has_solver():
        assert proof.seconds <= by_hand * 1.005


def test_meshes_of_few_hosts_are_of_any_number_from_any_host_on():
    given = Problem(step("grpo", given=texts(num_prompts=640)), device(per_host=2), 16)
    assert {2 * hosts for hosts in range(1, 9)} <= set(given.sizes())
    assert list(given.offsets(10)) == [0, 2, 4, 6]
    assert list(given.offsets(1)) == list(range(16))
    many = Problem(step("grpo"), device(per_host=2), 64)
    assert 10 not in many.sizes()
    assert list(many.offsets(12)) == [0, 12, 24, 36, 48]


def test_a_candidate_has_room_for_every_stage_where_some_layers_stay_as_they_are():
    large = llama(layers=12)
    given = Problem(step("ppo", actor=large, critic=large, num_frozen_layers=4), device(memory=64), 6)
    for use in given.uses:
        memory = Memory(given.step.roles[use.role])
        for layout in (one for one in given.layouts(use) if one.pipeline > 1):
            found, ranks = given.candidate(use, layout), map(layout.coordinates, range(layout.num_ranks))
            for rank in ranks:
                assert memory.kept(layout, rank).total <= found.kept
                for call in given.calls(use):
                    assert memory.working(call, layout, rank).total <= found.working[call.name]


def test_a_reader_ends_after_what_it_reads_even_where_it_slows_it_down():
    slow = {"1": 1.0, "2": 1.0, "3": 1.5, "4": 2.0}
    hardware = shared(slow=slow)
    crowding = {"decode": {"1": 1.0, "2": 3.0, "4": 8.0}, "forward": slow, "backward": slow, "update": slow}
    hardware = replace(hardware, profile=replace(hardware.profile, crowding=crowding))
    given = Problem(step("grpo"), hardware, 4)
    choice = placed(given, actor_generate=("d2t1p1", 0), reference_infer=("d1t1p1", 2), actor_train=("d2t1p1", 0))
    late = choice[Use("actor", "generate")].candidate.costs["rollout"].late
    own = choice[Use("reference", "infer")].candidate.seconds["reference"]
    played = evaluate(given.step, hardware, placements_of(given, choice))
    modelled = {bar.op.name: (bar.start, bar.end) for bar in timeline(given, choice)}
    for ends in ({one.name: (one.start, one.end) for one in played}, modelled):
        assert ends["reference"][0] < ends["rollout"][1]
        assert ends["reference"][1] >= ends["rollout"][1] + 0.99 * late * own


def away(given, *names):
    return replace(given, roles={n: replace(r, offloaded=n in names) for n, r in given.roles.items()})


def test_a_role_that_learns_and_is_offloaded_has_one_placement():
    """As the runtime asks on a GPU."""
    here, given = replace(device(), layer_delay=1e-4), step("grpo", given=texts(num_prompts=48))
    free = brute_force(Problem(given, here, 3, sharding=False))
    given = Problem(away(given, "actor"), here, 3, sharding=False)
    seconds, best = brute_force(given)
    assert not free[1][Use("actor", "train")].is_same(free[1][Use("actor", "generate")])
    found = search(given, seconds=2)
    proof = prove(given, found, seconds=5)
    for choice in (best, found, proof.choice):
        assert len({str(p) for p in placements_of(given, choice)["actor"].values()}) == 1
    assert score(given, found).seconds <= 1.02 * seconds
    assert proof.bound <= seconds * (1 + 1e-9)
    if has_solver():
        assert proof.seconds == pytest.approx(seconds, rel=1e-3)


PLACED = {
    "actor": {"train": Placement.parse("0-1", "d2t1p1"), "generate": Placement.parse("0-1", "d1t2p1")},
    "reference": {"infer": Placement.parse("0-1", "d2t1p1")},
}


def test_a_plan_by_hand_that_offloads_a_role_of_several_placements_is_refused_and_not_advised():
    both = away(step("grpo"), "actor", "reference")
    assert "is for roles with one placement" in shortages(both, device(), PLACED)[0]
    assert shortages(away(step("grpo"), "reference"), device(), PLACED) == []
    tight = device(memory=0.4)
    assert not any("all roles" in words for words in would_fit(step("grpo"), tight, PLACED))


def test_without_another_memory_offloading_frees_nothing_and_is_not_advised():
    here = replace(device(), machine=Machine(packs=True))
    one = {role: {kind: Placement.parse("0", "d1t1p1") for kind in kinds} for role, kinds in PLACED.items()}
    both = away(step("grpo"), "actor", "reference")
    assert peak_bytes(both, here, one) == peak_bytes(step("grpo"), here, one)
    assert max(e.end for e in evaluate(both, here, one)) == max(e.end for e in evaluate(step("grpo"), here, one))
    assert not Problem(both, here, 1).step.roles["actor"].offloaded
    most = max(peak_bytes(step("grpo"), here, one).values())
    tight = replace(here, memory=0.99 * most)
    assert shortages(both, tight, one)
    assert not any("offload" in words for words in would_fit(step("grpo"), tight, one))
    assert any("offload" in words for words in would_fit(step("grpo"), replace(tight, machine=Machine()), one))
