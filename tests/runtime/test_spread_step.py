"""PPO over four processes, each call in a layout and on a mesh of its own, is PPO in one process."""

import math

import pytest
import torch
import torch.distributed as dist
from gang import Cases
from tiny_rl import make_world, ppo_config, tiny_model

from meshift.batch import Batch, Outcome, Ragged
from meshift.config.sections import TrainableConfig
from meshift.graph.calls import Graph, HostCall, LoopCall
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.models.shards import shard_table
from meshift.runtime.peaks import PeakMeter
from meshift.runtime.role import LocalRole
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.spread_step import SpreadStep
from meshift.runtime.world import World
from meshift.step import run_step

NUM_STEPS = 3
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6], [5], [3, 5, 8], [9, 7, 9]]
SMOOTH = {"learning_rate": 0.02, "adam_epsilon": 1e-3}  # Adam magnifies the rounding of a tiny gradient
SECTIONS = {
    "actor": {"model_name_or_path": "unused", **SMOOTH, "max_tokens_per_micro_batch": 24},
    "critic": {**SMOOTH, "max_tokens_per_micro_batch": 16},
    "generation": {"max_completion_length": 6, "temperature": 0.9},
    "ppo": {"num_mini_batches": 2, "num_ppo_epochs": 2, "kl_coef": 0.2, "length_limit_is_end": True},
}
# role -> kind -> mesh and layout
SPREAD = {
    "actor": {"generate": ("0-3", "d4t1p1"), "train": ("0-3", "d2t2p1")},
    "critic": {"infer": ("0-1", "d2t1p1"), "train": ("0-1", "d2t1p1")},
    "reference": {"infer": ("2-3", "d1t2p1")},
}
PLANS = {
    "all-apart": {
        "actor": {"generate": ("0", "d1t1p1"), "train": ("1", "d1t1p1")},
        "critic": {"infer": ("2", "d1t1p1"), "train": ("2", "d1t1p1")},
        "reference": {"infer": ("3", "d1t1p1")},
    },
    "spread": SPREAD,
    "critic-moves": {
        **SPREAD,
        "actor": {"generate": ("2-3", "d1t2p1"), "train": ("0-1", "d2t1p1")},
        "critic": {"infer": ("3,2", "d1t2p1"), "train": ("0-3", "d1t4p1")},
    },
    "stages": {
        "actor": {"generate": ("2-3", "d1t1p2"), "train": ("0-3", "d2t1p2")},
        "critic": {"infer": ("0-1", "d1t1p2"), "train": ("3,2,1,0", "d2t1p2s")},
        "reference": {"infer": ("1,0", "d1t1p2")},
    },
    "sharded": {
        "actor": {"generate": ("3,1", "d1t2p1"), "train": ("0-1", "d2t1p1s")},
        "critic": {"infer": ("0-3", "d2t2p1s"), "train": ("0-3", "d2t2p1s")},
        "reference": {"infer": ("2-3", "d2t1p1")},
    },
    "sharded-everywhere": {
        "actor": {"generate": ("2,1,0", "d3t1p1s"), "train": ("0-3", "d4t1p1s")},
        "critic": {"infer": ("1,0", "d2t1p1s"), "train": ("2-3", "d1t2p1")},
        "reference": {"infer": ("3,2,1", "d3t1p1s")},
    },
    "host-not-first": {
        "actor": {"generate": ("3,2,1,0", "d2t2p1"), "train": ("3,2,1,0", "d4t1p1")},
        "critic": {"infer": ("2-3", "d1t2p1"), "train": ("2-3", "d1t2p1")},
        "reference": {"infer": ("1", "d1t1p1")},
    },
}


def odd(completion_ids):
    return [sum(i % 2 for i in ids) - 0.3 * len(ids) for ids in completion_ids]


def prompts_of(step):
    index = Ragged.scalars([step * len(PROMPTS) + i for i in range(len(PROMPTS))], torch.int64)
    return Batch({"prompts": Ragged.from_rows(PROMPTS, torch.int64), "index": index})


def spread_roles(config, plan, world):
    def role(name, head, section, offset):
        placements = {kind: Placement.parse(*written) for kind, written in plan[name].items()}

        def whole():
            model = tiny_model(head)
            if head == "value":
                torch.nn.init.zeros_(model.head.weight)
            return model

        def make(model, place, trainable):
            made = LocalRole(
                name,
                model,
                section,
                trainable=trainable,
                max_steps=NUM_STEPS,
                seed=config.seed + offset,
                place=place,
            )
            return made.can_generate(64, str) if name == "actor" else made

        return SpreadRole(name, placements, world, whole, make)

    return {
        "actor": role("actor", "lm", config.actor, 0),
        "critic": role("critic", "value", config.critic, 1),
        "reference": role("reference", "lm", TrainableConfig(), 0),
    }


def check_ppo(rank, name, sections=SECTIONS, part_size=None, num_streams=0):
    config = ppo_config(**sections)
    alone = make_world(odd, config, max_steps=NUM_STEPS)
    devices = {Device(index=i): i for i in range(4)}
    world = World(rank=rank, ranks=devices, group=dist.new_group(list(range(4)), backend="gloo"))
    roles = spread_roles(config, PLANS[name], world)
    graph = make_world(odd, config).graph  # another one: graphs remember, as value normalisation does
    spread = SpreadStep(graph, roles, world, part_size)
    PeakMeter._peak = lambda self: 10**9 * (1 + rank)  # in this process only
    for step in range(NUM_STEPS):
        expected, found = alone.step(PROMPTS, step), spread.run(prompts_of(step), step)
        if rank == 0:
            check_outcome(found, expected, f"{name}, step {step}")
            for call, members in spread.placements.items():
                most = found.metrics[f"perf/peak_memory_gb/{call}"]
                assert most == 1 + max(members), f"{call} of {members} has a peak of {most} GB"
            assert sum(key.startswith("stream_parts/") for key in found.metrics) == num_streams
    for role in ("actor", "critic", *(["reference"] if "reference" in sections else [])):
        check_weights(roles[role], alone.roles[role], name)


def check_outcome(found, expected, what, timed=("rollout", "values", "train_critic")):
    assert found.batch.fields.keys() == expected.batch.fields.keys()
    wrong = {
        key: (found.batch[key].values, field.values)
        for key, field in expected.batch.fields.items()
        if not torch.allclose(found.batch[key].values.double(), field.values.double(), atol=1e-4, rtol=1e-4)
    }
    assert not wrong, f"{what}: {wrong}"
    for key, value in expected.metrics.items():
        if not key.startswith("timing_s/") and "perf/time" not in key:
            # A clipped part counts tokens: one of 72 that stands at the edge may fall to either side.
            room = 1.5 / 72 if key.endswith("clipfrac") else 1e-4
            close = math.isclose(found.metrics[key], value, rel_tol=1e-3, abs_tol=room)
            assert close or math.isnan(value), f"{what}: {key} is {found.metrics[key]} instead of {value}"
    assert {f"start_s/{name}" for name in timed} <= found.metrics.keys()


def check_weights(role, whole, name):
    """Every process's part, where it is trained and where it was moved to."""
    table = shard_table(whole.model.config, whole.model.head_kind)
    weights = whole.master_weights()
    for placement, local in role._locals.items():
        boxes = boxes_of(placement.layout, table, placement.mesh.rank_of(role.world.device))
        for parameter, weight in local.model.named_parameters():
            part = weights[parameter][tuple(slice(*interval) for interval in boxes[parameter])]
            torch.testing.assert_close(weight.detach(), part, atol=2e-5, rtol=1e-4, msg=f"{name}: {parameter}")
        assert local.version == whole.version


MOVING = SECTIONS | {
    "reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2},
}


def two_rounds(graph, later):
    """A loop over PPO's whole step: first the step's own prompts, then `later`, a batch."""

    def feed(batch, outcomes):
        return (batch, later, None)[len(outcomes)]

    def collect(batch, outcomes):
        names = outcomes[0].metrics.keys() & outcomes[1].metrics.keys()
        kept = {name for name in names if not name.startswith(("timing_s/", "sync/", "stream_parts/"))}
        metrics = {
            f"round_{i}/{name}": outcome.metrics[name] for i, outcome in enumerate(outcomes) for name in kept
        }
        return Outcome(batch=Batch({"both": outcomes[0].batch["advantages"]}), metrics=metrics)

    reads = ("prompts", "index")
    loop = LoopCall(name="twice", graph=graph, feed=feed, collect=collect, reads=reads, writes=("both",))
    double = HostCall(name="double", function=lambda batch: Outcome(), reads=("both",))
    return Graph((loop, double), frozenset(reads))


def check_loop(rank, name, sections, part_size):
    config = ppo_config(**sections)
    alone = make_world(odd, config, max_steps=NUM_STEPS)
    world = World(
        rank=rank,
        ranks={Device(index=i): i for i in range(4)},
        group=dist.new_group(list(range(4)), backend="gloo"),
    )
    roles = spread_roles(config, PLANS[name], world)
    later = prompts_of(7).index([4, 0, 1])
    spread = SpreadStep(two_rounds(make_world(odd, config).graph, later), roles, world, part_size)
    for step in range(NUM_STEPS - 1):
        expected = run_step(two_rounds(alone.graph, later), alone.roles, prompts_of(step), step)
        found = spread.run(prompts_of(step), step)
        if rank == 0:
            check_outcome(found, expected, f"{name}, step {step}", ("double", "twice"))
    for role in ("actor", "critic", "reference"):
        check_weights(roles[role], alone.roles[role], name)


# The plan, the least rows of a part, and how many calls stream.
STREAMS = {
    "a row at a time": ("all-apart", 1, 2),
    "larger parts": ("all-apart", 4, 2),
    "one part": ("all-apart", 100, 2),
    "to tensor ranks, from data ranks": ("streaming", 2, 2),
    "not on the same device": ("spread", 1, 0),
    "one of two": ("one-streams", 1, 1),
    "from stages": ("stages", 2, 2),
    "to ranks that share out their state": ("sharded-streams", 2, 2),
}
PLANS["one-streams"] = PLANS["all-apart"] | {"reference": {"infer": ("0,3", "d1t2p1")}}
PLANS["sharded-streams"] = {
    "actor": {"generate": ("1,0", "d2t1p1"), "train": ("0-3", "d2t2p1s")},
    "critic": {"infer": ("2-3", "d2t1p1s"), "train": ("2-3", "d2t1p1s")},
    "reference": {"infer": ("3,2", "d2t1p1s")},
}
PLANS["streaming"] = {
    "actor": {"generate": ("1,0", "d2t1p1"), "train": ("0-3", "d2t2p1")},
    "critic": {"infer": ("2-3", "d1t2p1"), "train": ("2-3", "d1t2p1")},
    "reference": {"infer": ("3,2", "d2t1p1")},
}


STILL = ("spread", "host-not-first")
MOVES = ("all-apart", "critic-moves", "stages", "sharded", "sharded-everywhere")
LOOPS = {"all-apart": 2, "critic-moves": None}
MORE = ("larger parts", "one part")
CASES = {
    **{f"still: {name}": (check_ppo, name) for name in STILL},
    **{f"moving: {name}": (check_ppo, name, MOVING) for name in MOVES},
    **{f"loop: {name}": (check_loop, name, MOVING, part_size) for name, part_size in LOOPS.items()},
    **{f"stream: {case}": (check_ppo, name, SECTIONS, *how) for case, (name, *how) in STREAMS.items()},
}


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """What is not slow, in one gang."""
    slow = {f"stream: {case}" for case in MORE}
    return Cases(4, tmp_path_factory.mktemp("gang"), {n: case for n, case in CASES.items() if n not in slow})


@pytest.mark.parametrize("name", STILL)
def test_a_spread_step_is_the_step_of_one_process(spread, name):
    spread.check(f"still: {name}")


@pytest.mark.parametrize("name", MOVES)
def test_a_step_or_its_moving_reference_would_be_other_than_in_one_process(spread, name):
    spread.check(f"moving: {name}")


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_trains_would_be_another_over_several_processes(spread, name):
    spread.check(f"loop: {name}")


@pytest.mark.parametrize("case", [case for case in STREAMS if case not in MORE])
def test_streaming_would_give_another_step(spread, case):
    spread.check(f"stream: {case}")


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_streaming_in_larger_parts_would_give_another_step(case, tmp_path):
    Cases(4, tmp_path, {case: CASES[f"stream: {case}"]}).check(case)
