"""What a run predicts of itself: by one rule for all lengths, and in every process what its placements say."""

import json
from dataclasses import replace
from itertools import product as pairs

import pytest

from meshift.config.loading import make_config
from meshift.data.preferences import Pair
from meshift.data.prompts import Prompt
from meshift.layout.layout import Placement
from meshift.planner.hardware import KNOWN, as_values
from meshift.planner.memory import Machine, Memory
from meshift.planner.profile import PRODUCTS, SPEEDS, Message, Product, Profile
from meshift.planner.rollout_steps import Lengths
from meshift.runtime.auto_plan import Settled
from meshift.runtime.outlook import lengths_of, outlook, planned_step

PLACED = {
    "actor": {"train": Placement.parse("0-1", "d2t1p1"), "generate": Placement.parse("0-1", "d1t2p1")},
    "critic": {"train": Placement.parse("2", "d1t1p1"), "infer": Placement.parse("2", "d1t1p1")},
    "reference": {"infer": Placement.parse("1", "d1t1p1")},
    "reward": {"infer": Placement.parse("0", "d1t1p1")},
}


def crowded():
    """Two processors that processes share, each of which has a price."""
    profile = Profile(
        products=tuple(
            Product(kind=kind, dtype="float32", threads=threads, numbers=numbers, rows=rows, rate=1e9)
            for kind, threads, numbers, rows in pairs(PRODUCTS, (1, 2), (1e3, 1e7), (1, 1024))
        ),
        messages=tuple(
            Message(kind=kind, members=n, among=n, num_bytes=size, seconds=1e-4 + size / 1e9)
            for kind, n, size in pairs(("sum", "late", "gather", "send"), (2, 4), (1e3, 1e9))
        ),
        speeds={f"{kind}/float32": {"1": 1e9, "2": 2e9} for kind in SPEEDS},
        crowding={work: {"1": 1.0, "2": 1.5, "4": 3.0} for work in ("decode", "forward", "backward", "update")},
        cores=2,
    )
    return replace(
        KNOWN["h100"], name="crowded", memory=64e9, reserve=0.0, machine=Machine(packs=True), profile=profile
    )


@pytest.mark.parametrize("hardware", [KNOWN["h100"], crowded()], ids=["devices", "shared"])
def test_other_lengths_would_be_predicted_by_other_rules(ppo_config_on_disk, tmp_path, hardware):
    """Half of the limit is what is expected, and one of the lengths that are tried."""
    config = ppo_config_on_disk(tmp_path)
    found = outlook(config, PLACED, Lengths(prompt=4.0), (hardware, True))
    tried = dict(found.by_completion)
    calls = {event.name: event.end - event.start for event in found.events if event.kind == "call"}
    assert tried[3.0] == pytest.approx(calls)
    assert tried[6.0]["rollout"] > tried[3.0]["rollout"] > tried[1.0]["rollout"]
    assert tried[6.0]["train_critic"] > tried[3.0]["train_critic"]


def test_a_process_holds_what_is_placed_on_it(ppo_config_on_disk, tmp_path):
    """Process 2 has the critic alone: its states, and the most that a call of it needs."""
    config = ppo_config_on_disk(tmp_path)
    found = outlook(config, PLACED, Lengths(prompt=4.0), (KNOWN["h100"], True), 1e6)
    step = planned_step(config, Lengths(prompt=4.0))
    memory, placement = Memory(step.roles["critic"]), PLACED["critic"]["train"]
    where = placement.layout.coordinates(0)
    calls = [call for call in step.calls if call.role == "critic"]
    working = max(memory.working(call, placement.layout, where).total for call in calls)
    assert len(found.peaks) == 3
    assert found.peaks[2] == 1e6 + memory.kept(placement.layout, where).total + working
    assert found.metrics["perf/predicted_memory_gb/values"] <= found.peaks[2] / 1e9
    assert max(found.metrics.values()) == pytest.approx(max(found.peaks) / 1e9)


def test_offload_spares_nothing_where_the_host_is_the_device(ppo_config_on_disk, tmp_path):
    stays = ppo_config_on_disk(tmp_path)
    leaves = ppo_config_on_disk(tmp_path, plan={"critic": {"offload": True}})
    given = {name: dict.fromkeys(kinds, Placement.parse("0", "d1t1p1")) for name, kinds in PLACED.items()}
    gpu, cpu = KNOWN["h100"], replace(KNOWN["h100"], machine=Machine(packs=True))
    peaks = {
        (hardware, config): outlook(one, given, Lengths(prompt=4.0), (kind, True)).peaks[0]
        for hardware, kind in (("gpu", gpu), ("cpu", cpu))
        for config, one in (("stays", stays), ("leaves", leaves))
    }
    assert peaks["cpu", "stays"] == peaks["cpu", "leaves"]
    assert peaks["gpu", "leaves"] < peaks["gpu", "stays"]


def test_lengths_are_those_of_the_data(ppo_config_on_disk, reward_config_on_disk, tmp_path):
    prompts = [Prompt(tokens=[1] * n, text="", columns={}) for n in (2, 5)]
    expected = make_config(
        type(ppo_config_on_disk(tmp_path)),
        ppo_config_on_disk(tmp_path).model_dump() | {"plan": {"auto": {"completion_tokens": 5}}},
    )
    assert lengths_of(ppo_config_on_disk(tmp_path), prompts) == Lengths(prompt=3.5)
    assert lengths_of(expected, prompts) == Lengths(prompt=3.5, completion=5.0)
    pairs_ = [Pair(chosen=[1] * 7, rejected=[1] * 5, num_prompt_tokens=2, where="x:1")]
    assert lengths_of(reward_config_on_disk(tmp_path), pairs_) == Lengths(prompt=2.0, completion=4.0)


def test_a_plan_that_was_searched_by_a_profile_is_predicted_by_it(ppo_config_on_disk, tmp_path):
    """Whatever became of the profile: as the processes of a run are told, in JSON."""
    config = ppo_config_on_disk(tmp_path)
    busy = replace(crowded(), profile=replace(crowded().profile, others=1.5))
    for one, was_busy in ((busy, True), (crowded(), False)):
        told = {"hardware": as_values(one), "hardware_is_measured": True}
        settled = Settled(config=config, found=json.loads(json.dumps(told)))
        assert settled.hardware == (one, True)
        found = outlook(config, PLACED, Lengths(prompt=4.0), settled.hardware)
        assert found.values()["hardware_was_busy"] is was_busy
        assert found.values()["hardware"]["profile"] is None
