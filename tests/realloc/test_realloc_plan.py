"""Plans, carried out by the plain executor: every number arrives once, and no byte too many is sent."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from byte_executor import NUMPY, RATE, Executor, least_wire_bytes, place, slices, whole_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tables import family_table, placement_pairs, random_tables

from meshift.errors import LayoutError
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Placement
from meshift.models.hf.families import FAMILIES
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.plan import Plans, plan, unchanged

FP32 = Dtypes(source="float32", target="float32")
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
PAIRS = [
    (("0-3", "d2t2p1"), ("0-3", "d1t4p1")),
    (("0-3", "d4t1p1s"), ("0-3", "d1t4p1")),
    (("0-5", "d1t2p3"), ("4-9", "d3t2p1s")),
    (("0-4", "d1t5p1"), ("5-10", "d1t6p1")),
    (("0", "d1t1p1"), ("3,2,1,0", "d1t1p4")),
]


def assert_delivered(executor, whole, shards, names=None):
    """Each number of each target shard was written once and is the model's."""
    target = executor.plan.target
    for rank, device in enumerate(target.mesh.devices):
        for name, box in boxes_of(target.layout, shards, rank).items():
            if names is None or name in names:
                assert (executor.written[device][name] == 1).all(), name
                np.testing.assert_array_equal(executor.target[device][name], whole[name][slices(box)])
            else:
                assert not executor.written[device][name].any(), name


def there_and_back(source, target, shards, finest):
    whole = whole_model(shards)
    made = plan(source, target, shards, dtypes=FP32, finest=finest)
    there = Executor(made, shards, place(whole, source, shards))
    arrived = there.run()
    assert_delivered(there, whole, shards)
    least = least_wire_bytes(source, target, shards, 4, set(shards))
    assert there.wire_bytes == made.wire_bytes == sum(made.received) == least
    back = Executor(plan(target, source, shards, dtypes=FP32, finest=finest), shards, arrived)
    back.run()
    assert_delivered(back, whole, shards)


@settings(SLOW, max_examples=120)
@given(data=st.data(), shards=random_tables(), finest=st.sampled_from([1, 16, 1 << 20]))
def test_every_number_arrives_once_with_the_fewest_bytes_and_comes_back_the_same(data, shards, finest):
    there_and_back(*data.draw(placement_pairs(shards)), shards, finest)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "@".join(pair[0]) + ">" + "@".join(pair[1]))
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_moves_there_and_back(name, pair):
    source, target = (Placement.parse(*written) for written in pair)
    there_and_back(source, target, family_table(name), finest=64)


@settings(SLOW, max_examples=60)
@given(data=st.data(), shards=random_tables())
def test_only_ranks_that_hold_a_box_send_it_and_from_the_receivers_host_if_they_can(data, shards):
    source, target = data.draw(placement_pairs(shards))
    held = [boxes_of(source.layout, shards, rank) for rank in range(source.layout.num_ranks)]
    wanted = [boxes_of(target.layout, shards, rank) for rank in range(target.layout.num_ranks)]

    def contains(outer, inner):
        return all(a[0] <= b[0] and b[1] <= a[1] for a, b in zip(outer, inner, strict=True))

    for transfer in plan(source, target, shards, finest=1).transfers():
        name, box = transfer.name, transfer.box
        assert contains(held[transfer.source][name], box)
        assert contains(wanted[transfer.target][name], box)
        assert source.device(transfer.source) != target.device(transfer.target)
        host = target.device(transfer.target).host
        holders = [rank for rank, boxes in enumerate(held) if name in boxes and contains(boxes[name], box)]
        nearby = [rank for rank in holders if source.device(rank).host == host]
        assert transfer.source in (nearby or holders)


def test_a_layout_that_does_not_change_is_aliased_and_nothing_is_sent_or_copied():
    shards, at = family_table("llama"), Placement.parse("0-3", "d2t2p1")
    executor = Executor(plan(at, at, shards), shards, place(whole_model(shards, "bfloat16"), at, shards))
    executor.run()
    assert executor.plan.wire_bytes == executor.plan.copied_bytes == 0
    for device, arrays in executor.target.items():
        assert all(array is executor.held[device][name] for name, array in arrays.items())
    assert executor.plan.aliased_bytes == sum(
        array.nbytes for a in executor.target.values() for array in a.values()
    )


def test_what_a_device_keeps_the_whole_of_is_aliased_and_a_part_of_it_copied():
    shards = family_table("llama")
    made = plan(Placement.parse("0-1", "d2t1p1"), Placement.parse("0-1", "d1t2p1"), shards)
    share = made.share(made.target.device(0))
    assert not share.sends
    assert not share.receives
    assert {alias.name for alias in share.aliases} == {n for n, s in shards.items() if s.split is None}
    assert {copy.name for copy in share.copies} == {n for n, s in shards.items() if s.split is not None}


@settings(SLOW, max_examples=30)
@given(data=st.data(), shards=random_tables())
def test_parameters_left_out_are_left_alone(data, shards):
    source, target = data.draw(placement_pairs(shards))
    left_out = data.draw(st.sets(st.sampled_from(sorted(shards))))
    made = plan(source, target, shards, dtypes=FP32, leave_out=left_out)
    whole = whole_model(shards)
    executor = Executor(made, shards, place(whole, source, shards))
    executor.run()
    assert_delivered(executor, whole, shards, names=set(shards) - left_out)
    assert made.wire_bytes == least_wire_bytes(source, target, shards, 4, set(shards) - left_out)


def test_a_layout_too_deep_for_the_model_is_refused_even_if_no_layer_moves():
    shards = family_table("llama")
    layers = [name for name in shards if name.startswith("layers.")]
    with pytest.raises(LayoutError, match="use p5 or less"):
        plan(Placement.parse(0, "d1"), Placement.parse("0-5", "p6"), shards, leave_out=layers)


def test_a_name_to_leave_out_that_the_model_lacks_is_an_error():
    at = Placement.parse(0, "d1")
    with pytest.raises(KeyError, match=r"no parameter layers\.9"):
        plan(at, at, family_table("llama"), leave_out=["layers.9"])


def test_unchanged_are_the_parameters_whose_version_the_target_has():
    assert unchanged({"a": 3, "b": 3, "c": 0}, {"a": 3, "b": 4, "c": 0, "d": 0}) == {"a", "c"}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "@".join(pair[0]) + ">" + "@".join(pair[1]))
@pytest.mark.parametrize(
    ("held", "wanted", "wire"),
    [("float32", "float16", 2), ("float16", "float32", 2), ("float64", "float32", 4), ("float32", "float32", 4)],
)
def test_a_cast_is_sent_in_the_narrower_type_and_equals_a_cast_of_the_whole(pair, held, wanted, wire):
    source, target = (Placement.parse(*written) for written in pair)
    shards = family_table("qwen3")
    made = plan(source, target, shards, dtypes=Dtypes(source=held, target=wanted))
    whole = {name: (array / 3000).astype(NUMPY[held]) for name, array in whole_model(shards, held).items()}
    executor = Executor(made, shards, place(whole, source, shards))
    executor.run()
    assert_delivered(executor, {name: array.astype(NUMPY[wanted]) for name, array in whole.items()}, shards)
    assert executor.wire_bytes == made.wire_bytes == least_wire_bytes(source, target, shards, wire, set(shards))
    assert (executor.num_aliases == 0) or held == wanted


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "@".join(pair[0]) + ">" + "@".join(pair[1]))
def test_mixing_adds_to_what_the_target_has_and_never_aliases(pair):
    source, target = (Placement.parse(*written) for written in pair)
    shards = family_table("gpt2")
    new, old = whole_model(shards, "float64", seed=1), whole_model(shards, "float64", seed=2)
    made = plan(source, target, shards, dtypes=Dtypes(source="float64", target="float64"), mix=True)
    executor = Executor(made, shards, place(new, source, shards), place(old, target, shards))
    executor.run()
    mixed = {name: RATE * new[name] + (1 - RATE) * old[name] for name in shards}
    assert_delivered(executor, mixed, shards)
    assert executor.num_aliases == made.aliased_bytes == 0
    assert not any(np.shares_memory(executor.target[d][n], executor.held[d][n])
                   for d in executor.target if d in executor.held for n in executor.target[d]
                   if n in executor.held[d])  # fmt: skip


def test_a_type_without_a_size_is_refused():
    with pytest.raises(ValueError, match="fp32 is none of the types"):
        Dtypes(source="fp32")


def test_plans_are_made_once_for_each_pair_type_and_choice_of_parameters():
    plans, shards = Plans(family_table("llama")), family_table("llama")
    source, target = Placement.parse("0-3", "d2t2p1"), Placement.parse("0-3", "d1t4p1")
    made = plans.between(source, target)
    assert plans.between(Placement.parse("0-3", "t2d2"), target) is made
    assert made == plan(source, target, shards)
    others = [
        plans.between(target, source),
        plans.between(source, target, dtypes=FP32),
        plans.between(source, target, mix=True),
        plans.between(source, target, leave_out={"norm.weight"}),
    ]
    assert len({id(made), *map(id, others)}) == 5


def test_the_log_of_a_plan_is_json_and_adds_up():
    source, target = Placement.parse("a:0-3", "d2t2p1s"), Placement.parse("b:0-1,a:0-1", "d1t4p1")
    made = plan(source, target, family_table("llama"))
    log = json.loads(made.to_json())
    assert log["source"] == "d2t2p1s@a:0-3"
    assert log["target"] == "d1t4p1@b:0-1,a:0-1"
    assert sum(log["sent"]) == sum(log["received"]) == log["wire_bytes"] == made.wire_bytes > 0
    assert log["num_transfers"] == len(list(made.transfers()))
    assert sum(t.num_bytes for t in made.transfers()) == made.wire_bytes
    assert sorted(name for moves in log["moves"] for name in moves["parameters"]) == sorted(family_table("llama"))


def test_ranks_that_plan_each_for_themselves_make_the_same_plan():
    code = (
        "from tiny_tables import family_table\n"
        "from meshift.layout.layout import Placement\n"
        "from meshift.realloc.plan import plan\n"
        "source, target = Placement.parse('a:0-5,b:0-5', 'd3t2p2s'), Placement.parse('b:0-5,a:0-1', 'd4t2p1')\n"
        "print(plan(source, target, family_table('qwen2'), finest=1).digest())"
    )
    found = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        found.add(
            subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
        )
    assert len(found) == 1
    assert len(found.pop().strip()) == 64
