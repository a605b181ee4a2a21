"""A request gets a plan with its figures, or what is short and what would fit."""

from dataclasses import replace

import pytest
from tiny_steps import GIB, device, llama, problem, step, texts

from meshift.config.plan import PolicyPlan
from meshift.config.sections import TrainableConfig
from meshift.layout.layout import Layout, Placement
from meshift.planner import planning, search
from meshift.planner.bounds import least_seconds
from meshift.planner.candidates import Problem
from meshift.planner.evaluate import evaluate, peak_bytes
from meshift.planner.explain import explanation, of_rivals
from meshift.planner.memory import Machine
from meshift.planner.planning import make_plan
from meshift.planner.prove import Proof, has_solver
from meshift.planner.search import score
from meshift.planner.shortage import shortage
from meshift.planner.strategies import STRATEGIES
from meshift.planner.timeline import Spot, timeline
from meshift.planner.tuning import with_settings
from meshift.planner.uses import Use
from meshift.planner.written import placements_of, plan_values


def test_a_plan_comes_with_its_proof_its_events_and_what_it_gains():
    planned = make_plan(step("ppo"), device(), 4, seconds=4)
    assert planned.lacking == 0
    assert {event.name for event in planned.events} >= {call.name for call in planned.problem.step.calls}
    assert [rival.name for rival in planned.rivals] == list(STRATEGIES)
    assert all(rival.seconds is None or rival.seconds >= planned.proof.seconds for rival in planned.rivals)
    assert planned.proof.proven == has_solver()
    assert planned.proof.bound <= planned.proof.seconds


def test_an_explanation_names_every_call_its_layout_and_the_share_of_moves():
    planned = make_plan(step("grpo"), device(), 4, seconds=3)
    text = "\n".join(explanation(planned))
    for use, spot in planned.choice.items():
        assert f"({use}) runs as {spot.candidate.layout} on {spot.candidate.size} devices" in text
    assert "decoding" in text
    assert ("Nothing is proven" in text) == (not has_solver())


def test_what_is_short_is_said_with_changes_that_help():
    tight = device(memory=0.5)
    planned = make_plan(step("grpo", given=texts(num_prompts=256)), tight, 1, seconds=2)
    assert planned.lacking > 0
    assert "rollout" in shortage(planned)[0] or "train_actor" in shortage(planned)[0]
    count = next(int(change.split()[0]) for change in planned.changes if "devices instead" in change)
    assert make_plan(step("grpo", given=texts(num_prompts=256)), tight, count, seconds=2).lacking == 0
    assert any("h100" in change and change.endswith("in place of small") for change in planned.changes)


def test_what_is_short_is_counted_with_all_that_a_plan_may_set():
    """Where the others are away and passes are small, one role that is too large is; not all of them together."""
    large = llama(layers=8)
    planned = make_plan(step("ppo", actor=large, critic=large), device(memory=1.0), 1, seconds=2)
    states = [memory.kept(Layout(), Layout().coordinates(0)).total for memory in planned.problem.memories.values()]
    assert 0 < planned.lacking < sum(states) - planned.problem.capacity
    said = shortage(planned)[0]
    assert "even with actor, reference, critic in the host's memory between their calls" in said
    assert f"{planned.lacking / 1e9:.1f} GB too much" in said
    processor = replace(device(memory=1.0), machine=Machine(packs=True))
    kept = make_plan(step("ppo", actor=large, critic=large), processor, 1, seconds=2)
    assert "host's memory" not in shortage(kept)[0]


def test_a_plan_by_hand_that_needs_other_devices_would_be_said_to_need_more():
    planned = make_plan(step("ppo"), device(), 9, seconds=2)  # one host, and a device of another
    told = dict(of_rivals(planned))
    assert {rival.name for rival in planned.rivals if rival.seconds is None} == {
        name for name, words in told.items() if words == "cannot be made of 9 devices"
    }
    assert told["one layout for all"] == "cannot be made of 9 devices"


def test_roles_leave_their_devices_only_where_nothing_else_fits():
    large = llama(layers=4)
    roomy = make_plan(step("ppo", actor=large, critic=large), device(memory=8), 1, seconds=2)
    assert not any(plan.get("offload") for plan in plan_values(roomy.problem, roomy.choice).values())
    tight = make_plan(step("ppo", actor=large, critic=large), device(memory=2.2), 1, seconds=4)
    assert tight.lacking == 0
    assert any(plan.get("offload") for plan in plan_values(tight.problem, tight.choice).values())
    peaks = peak_bytes(tight.problem.step, tight.problem.hardware, placements_of(tight.problem, tight.choice))
    assert max(peaks.values()) <= tight.problem.capacity


def test_micro_batches_that_are_faster_are_part_of_the_plan():
    dear = replace(device(), layer_delay=0.01)
    planned = make_plan(step("grpo"), dear, 2, seconds=2)
    assert planned.values == plan_values(planned.problem, planned.choice)  # one pass has all of it
    given = step("grpo", given=texts(num_prompts=64))
    few = {n: replace(r, passes=TrainableConfig(max_tokens_per_micro_batch=64)) for n, r in given.roles.items()}
    planned = make_plan(replace(given, roles=few), dear, 2, seconds=2)
    plan = PolicyPlan.model_validate(planned.values)
    assert plan.actor.max_tokens_per_micro_batch > 64
    assert plan.reference.max_tokens_per_micro_batch is None
    given = evaluate(
        planned.asked, planned.problem.hardware, placements_of(planned.problem, planned.choice)
    )  # the same placements with the config's
    assert planned.seconds < max(event.end for event in given) * 0.99
    assert planned.seconds >= planned.proof.bound * (1 - 1e-6)
    written = evaluate(planned.step, planned.problem.hardware, placements_of(planned.problem, planned.choice))
    assert list(planned.events) == written
    assert planned.step.roles["actor"].passes.max_tokens_per_micro_batch == plan.actor.max_tokens_per_micro_batch


def test_drawing_ahead_takes_as_long_as_the_slower_half_where_they_have_devices_of_their_own():
    given = step("grpo")
    rollout, others = given.calls[0], given.calls[1:]
    free = (replace(call, waits=call.waits - {rollout.name}) for call in others)
    ahead = replace(given, calls=(*free, rollout), draws_ahead=True)  # as `rollout_steps` writes it
    apart = {
        "actor": {"generate": Placement.parse("1", "d1"), "train": Placement.parse("0", "d1")},
        "reference": {"infer": Placement.parse("0", "d1")},
    }
    one = {role: {kind: Placement.parse("0", "d1") for kind in kinds} for role, kinds in apart.items()}
    for placements, together in ((apart, True), (one, False)):
        events = {event.name: event for event in evaluate(ahead, device(), placements)}
        rest = sum(events[call.name].end - events[call.name].start for call in others)
        drawn = events["rollout"].end - events["rollout"].start
        begun = max(drawn, rest) if together else drawn + rest
        assert events["actor to generate"].start == pytest.approx(begun)
    took = [max(event.end for event in evaluate(one, device(), apart)) for one in (ahead, given)]
    assert took[0] < 0.95 * took[1]
    planned = [make_plan(one, device(), 2, seconds=2) for one in (ahead, given)]
    assert planned[0].seconds <= planned[1].seconds * (1 + 1e-12)  # the order of sums
    assert planned[0].seconds <= took[0]


@pytest.mark.parametrize("num_devices", [1, 3, 5, 7])
def test_any_number_of_devices_has_a_plan(num_devices):
    planned = make_plan(step("grpo"), device(), num_devices, seconds=1)
    assert planned.lacking == 0
    assert all(spot.first >= 0 and spot.stop <= num_devices for spot in planned.choice.values())


@pytest.mark.parametrize("pair", [("d8t1p1", "d2t4p1"), ("d2t2p2", "d4t2p1"), ("d8t1p1s", "d4t2p1")])
def test_moves_between_many_ranks_are_counted_as_plans_of_few_have_them(pair, monkeypatch):
    given, placed = (
        step("ppo"),
        {"infer": ("0-7", "d8t1p1"), "train": ("0-7", pair[0]), "generate": ("0-7", pair[1])},
    )
    placed = {kind: Placement.parse(*where) for kind, where in placed.items()}
    placements = dict.fromkeys(given.roles, placed)
    seconds = []
    for most in (256, 1):
        monkeypatch.setattr("meshift.planner.evaluate.MAX_PLANNED", most)
        events = evaluate(given, device(), placements)
        seconds.append({event.name: event.end - event.start for event in events if event.kind == "move"})
    assert seconds[0] == pytest.approx(seconds[1], rel=0.25)
    assert max(seconds[0].values()) > 0


def test_devices_that_no_way_by_hand_can_use_alike():
    """Seven devices, four heads, two layers, and two sequences to an update: nothing runs on all of them alike."""
    given = step("grpo", actor=llama(heads=4), given=texts(num_prompts=4))
    planned = make_plan(given, device(), 7, seconds=1.0)
    assert planned.lacking == 0
    assert {rival.name: rival.seconds for rival in planned.rivals if rival.seconds is None}.keys() >= {
        "one layout for all",
        "Megatron heuristic",
        "colocated",
    }


def test_a_way_by_hand_would_have_more_data_ranks_than_an_update_has_sequences():
    given = problem("grpo", 2, given=texts(num_prompts=2))  # two updates of one sequence each
    for choice in (make(given) for make in STRATEGIES.values()):
        assert choice is None or choice[Use("actor", "train")].candidate.layout.data == 1


def test_a_bound_would_count_the_packing_of_weights_twice():
    """On devices that pack weights before they generate, a plan is no faster than its own bound."""
    packing = replace(device(), memory_rate=1e8, machine=Machine(packs=True))
    given = problem("grpo", 2, hardware=packing, given=texts(num_prompts=8, completion=4.0, most=8))
    apart = {use: Layout(data=1 + (use.kind == "train")) for use in given.uses}
    choice = {use: Spot(given.candidate(use, layout), 0) for use, layout in apart.items()}
    alone = {use: (spot.candidate,) for use, spot in choice.items()}
    calls = [bar for bar in timeline(given, choice) if bar.op.kind == "call"]
    assert least_seconds(given, alone) <= max(bar.end for bar in calls) * (1 + 1e-9)


def test_passes_are_made_smaller_before_it_is_said_that_nothing_fits():
    given = step("grpo", given=texts(num_prompts=512, completion=200.0))
    huge = {
        n: replace(r, passes=TrainableConfig(max_tokens_per_micro_batch=1 << 20)) for n, r in given.roles.items()
    }
    asked = replace(given, roles=huge)
    planned = make_plan(asked, device(memory=2.0), 1, seconds=3)
    assert planned.lacking == 0
    assert 0 < planned.values["actor"]["max_tokens_per_micro_batch"] < 1 << 20
    assert not any(role.offloaded for role in planned.step.roles.values())
    placements = placements_of(planned.problem, planned.choice)
    assert max(peak_bytes(planned.step, planned.problem.hardware, placements).values()) <= 2.0 * GIB
    assert max(peak_bytes(asked, planned.problem.hardware, placements).values()) > 2.0 * GIB


def test_a_plan_by_hand_is_as_good_as_it_can_be_with_what_the_plan_offloads():
    large = llama(layers=4)
    planned = make_plan(step("ppo", actor=large, critic=large), device(memory=1.2), 2, seconds=3)
    away = [name for name, role in planned.step.roles.items() if role.offloaded]
    assert planned.lacking == 0
    assert "actor" in away
    for name in away:
        assert len(set(placements_of(planned.problem, planned.choice)[name].values())) == 1
    assert any(rival.seconds is not None and rival.lacking == 0 for rival in planned.rivals)
    assert all(r.seconds is None or r.lacking > 0 or r.seconds >= 0.98 * planned.seconds for r in planned.rivals)


def test_placements_suit_the_settings_that_a_plan_has(monkeypatch):
    """Without a solver, which would find them too where it has the time."""
    asked, changed = (
        Problem(step("ppo").with_passes(("actor", "critic"), max_tokens_per_micro_batch=n), device(), 4)
        for n in (256, 1024)
    )
    poor, settled = next(search.beginnings(asked)), next(search.beginnings(changed))
    found = iter([(changed, settled), None])
    monkeypatch.setattr(planning, "tuned", lambda given, choice: next(found))
    monkeypatch.setattr(
        planning, "prove", lambda given, known, **_: Proof(known, score(given, known).seconds, 0, False)
    )
    given, proof = planning._proven(asked, poor, seconds=4)
    assert given is changed
    assert proof.seconds < 0.95 * score(changed, settled).seconds


@pytest.mark.parametrize("tokens", [2048, 64])
def test_a_plan_is_no_slower_than_a_known_one_carried_over(monkeypatch, tokens):
    """Where search and proof find nothing: from another network, and from half the devices and work."""

    def asked(num_prompts):
        given = step("ppo", given=texts(num_prompts=num_prompts))
        return given.with_passes(("actor", "critic", "reference"), max_tokens_per_micro_batch=tokens)

    near, far = device(per_host=4), device(per_host=4, far=0.1e9)
    bases = [make_plan(asked(128), near, 8, seconds=3), make_plan(asked(64), far, 4, seconds=3)]
    assert bool(bases[0].settings) == (tokens == 64)
    monkeypatch.setattr(planning, "search", lambda given, **_: next(search.beginnings(given)))
    monkeypatch.setattr(
        planning, "prove", lambda given, known, **_: Proof(known, score(given, known).seconds, 0, False)
    )
    monkeypatch.setattr(planning, "tuned", lambda given, choice: None)
    alone = make_plan(asked(128), far, 8)
    for base, factor in zip(bases, (1, 2), strict=True):
        given = Problem(with_settings(asked(128), base.settings), far, 8)
        there = planning.carried(given, base.choice, factor)
        assert there is not None
        assert score(given, there).excess == 0
        seeded = make_plan(asked(128), far, 8, known=[base])
        assert seeded.proof.seconds <= score(given, there).seconds * (1 + 1e-9) < alone.proof.seconds


def test_what_cannot_be_carried_over_is_not():
    base = make_plan(step("ppo"), device(per_host=4), 8, seconds=2)
    assert planning.carried(problem("ppo", 3), base.choice, 3 / 8) is None
    assert planning.carried(problem("dpo", 8), {}, 1) is None
