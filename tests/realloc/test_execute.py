"""Parameters really move between processes: the right bits, the planned bytes, a proof that sees what is wrong."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from tiny_tables import family_table

from meshift.errors import ReallocationError
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import Peers
from meshift.realloc import signals
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.execute import Reallocation, Site
from meshift.realloc.near import NearMemory
from meshift.realloc.plan import plan

NUM_PROCESSES = 4
RATE = 0.3
PAIRS = [
    (("0-3", "d2t2p1"), ("0-3", "d1t4p1")),
    (("0-3", "d1t4p1"), ("0-3", "d4t1p1")),
    (("0-3", "d4t1p1s"), ("0-3", "d1t2p2")),
    (("0-1", "d1t2p1"), ("2-3", "d1t1p2")),
    (("0-2", "d1t3p1"), ("1-3", "d3t1p1s")),
    (("0", "d1t1p1"), ("3,2,1,0", "d1t1p4")),
    (("3,1", "d2t1p1"), ("0-3", "d2t2p1s")),
]
FORMS = [
    (Dtypes(), False, 10**9),
    (Dtypes(source="float32", target="float32"), False, 3000),
    (Dtypes(source="float32", target="bfloat16"), False, 10**9),
    (Dtypes(source="bfloat16", target="float32"), False, 5000),
    (Dtypes(source="float32", target="float32"), True, 4000),
    (Dtypes(source="float32", target="bfloat16"), True, 10**9),
]


def tables():
    return {"tied": family_table("llama", tie_word_embeddings=True), "biases": family_table("qwen2")}


def whole_model(table, dtype, seed):
    """Name -> the whole parameter, the same in every process."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shard.shape, generator=draw).to(dtype) for name, shard in table.items()}


def shards_of(whole, placement, table, device):
    rank = placement.mesh.rank_of(device)
    if rank is None:
        return {}
    boxes = boxes_of(placement.layout, table, rank)
    return {name: whole[name][tuple(slice(*interval) for interval in box)].clone() for name, box in boxes.items()}


def site_of(rank, max_bytes=10**9):
    devices = [Device(index=i) for i in range(NUM_PROCESSES)]
    return Site(device=devices[rank], ranks={d: i for i, d in enumerate(devices)}, max_bytes=max_bytes)


def placements(pair):
    return tuple(Placement.parse(*one) for one in pair)


def bytes_of(per_rank, placement, device):
    rank = placement.mesh.rank_of(device)
    return 0 if rank is None else per_rank[rank]


def move_and_compare(rank, pair, table, dtypes, mix, max_bytes):
    source, target = placements(pair)
    site = site_of(rank, max_bytes)
    made = plan(source, target, table, dtypes=dtypes, mix=mix, finest=64)
    there = Reallocation(made, table, site)
    there.agree()
    whole = whole_model(table, getattr(torch, dtypes.source), 0)
    held = shards_of(whole, source, table, site.device)
    sent = {name: value.to(getattr(torch, dtypes.wire)) for name, value in whole.items()}
    expected = shards_of(sent, target, table, site.device)
    into = None
    if mix:
        old = whole_model(table, getattr(torch, dtypes.target), 1)
        into = shards_of(old, target, table, site.device)
        expected = {name: into[name].float().lerp(expected[name].float(), RATE) for name in into}
    arrived = there.run(held, into, RATE if mix else None)
    assert set(arrived.shards) == set(expected)
    for name, value in arrived.shards.items():
        assert torch.equal(value, expected[name].to(value.dtype)), (name, pair, dtypes)
    assert arrived.sent_bytes == bytes_of(made.sent, source, site.device)
    assert arrived.received_bytes == bytes_of(made.received, target, site.device)
    if mix:
        return
    there.verify(held, arrived.shards)
    aliases = {alias.name for alias in made.share(site.device).aliases}
    assert aliases == {n for n, v in arrived.shards.items() if n in held and v.data_ptr() == held[n].data_ptr()}
    same = Dtypes(source=dtypes.target, target=dtypes.target)
    back = Reallocation(plan(target, source, table, dtypes=same), table, site)
    again = back.run(arrived.shards).shards
    for name, value in again.items():
        assert torch.equal(value, held[name].to(value.dtype)), name


def move_everything(rank):
    """Every pair in two forms, in turn, so that each form meets several pairs and both tables."""
    for i, pair in enumerate(PAIRS):
        for j, table in enumerate(tables().values()):
            for form in (2 * i + j, 2 * i + j + 3):
                move_and_compare(rank, pair, table, *FORMS[form % len(FORMS)])


def test_every_pair_of_layouts_gets_the_bits_and_bytes_that_were_planned(tmp_path):
    run_gang(NUM_PROCESSES, move_everything, tmp_path)


def find_faults(rank):
    table, (source, target) = tables()["tied"], placements(PAIRS[0])
    site = site_of(rank)
    whole = whole_model(table, torch.bfloat16, 0)
    held = shards_of(whole, source, table, site.device)
    there = Reallocation(plan(source, target, table), table, site)
    name = "layers.2.mlp.down.weight" if "layers.2.mlp.down.weight" in table else list(table)[7]
    replicated = next(n for n, shard in table.items() if shard.split is None)
    faults = {
        name: lambda shard: shard.view(-1)[3:4].mul_(-1),
        replicated: lambda shard: shard.copy_(shard.flip(0)),
    }
    for broken, spoil in faults.items():
        arrived = {n: value.clone() for n, value in there.run(held).shards.items()}
        there.verify(held, arrived)
        if rank == 2:
            spoil(arrived[broken])
        with pytest.raises(ReallocationError, match=f"the parameter {broken} is not what was sent"):
            there.verify(held, arrived)
    other = Reallocation(plan(source, target, table, leave_out=[name] if rank == 1 else []), table, site)
    with pytest.raises(ReallocationError, match="has another plan"):
        other.agree()
    wrong = {n: value.float() for n, value in held.items()}
    with pytest.raises(ValueError, match="float32"):
        there.run(wrong)
    with pytest.raises(ValueError, match="takes no rate"):
        there.run(held, rate=0.5)


def test_a_number_that_changed_and_a_plan_that_differs_stop_every_process(tmp_path):
    run_gang(NUM_PROCESSES, find_faults, tmp_path)


def leave_out_and_repeat(rank):
    """What the target has already is neither sent nor returned, and one `Reallocation` serves every step."""
    table, (source, target) = tables()["tied"], placements(PAIRS[1])
    site, frozen = site_of(rank), [name for name in tables()["tied"] if "layers.0." in name]
    there = Reallocation(plan(source, target, table, leave_out=frozen), table, site)
    memory = shards_of(whole_model(table, torch.bfloat16, 9), target, table, site.device)
    aliases = {alias.name for alias in there.plan.share(site.device).aliases}
    assert aliases
    assert len(aliases) < len(memory) - len(frozen)
    for step in range(3):
        whole = whole_model(table, torch.bfloat16, step)
        held = shards_of(whole, source, table, site.device)
        arrived = there.run(held, memory)
        assert not set(frozen) & set(arrived.shards)
        expected = shards_of(whole, target, table, site.device)
        for name, value in arrived.shards.items():
            assert torch.equal(value, expected[name])
            own = held if name in aliases else memory
            assert value.data_ptr() == own[name].data_ptr()
    assert frozen


def test_frozen_parameters_stay_and_memory_is_used_again(tmp_path):
    run_gang(NUM_PROCESSES, leave_out_and_repeat, tmp_path)


def move_by_near_memory(rank, pair, table):
    """The same bits through memory that is mapped, and those of the next time, when the source has changed."""
    source, target = placements(pair)
    site = site_of(rank)
    there = Reallocation(plan(source, target, table), table, site)
    everybody = Peers(ranks=tuple(range(NUM_PROCESSES)), index=rank, group=dist.group.WORLD)
    held = shards_of(whole_model(table, torch.bfloat16, 0), source, table, site.device)
    memory = NearMemory.make({name: (tuple(t.shape), t.dtype) for name, t in held.items()})
    where = gather_facts(memory.where, everybody)
    ranks = [site.ranks[device] for device in source.mesh.devices]
    there.near = {one: NearMemory.open(where[ranks[one]], form) for one, form in there.senders().items()}
    gather_facts(None, everybody)
    memory.close()
    into = None
    for seed in (1, 2):
        whole = whole_model(table, torch.bfloat16, seed)
        time.sleep(0.03 * ((rank + seed) % 3))  # those who are early would read the last time's
        for name, shard in shards_of(whole, source, table, site.device).items():
            memory.tensors[name].copy_(shard)
        arrived = there.run(memory.tensors, into)
        expected = shards_of(whole, target, table, site.device)
        assert arrived.shards.keys() == expected.keys()
        assert all(shard.equal(expected[name]) for name, shard in arrived.shards.items())
        assert arrived.received_bytes == bytes_of(there.plan.received, target, site.device)
        there.verify(memory.tensors, arrived.shards)
        into = dict(arrived.shards)
    arrived = there.run(memory.tensors, into)
    aliased = {alias.name for alias in there.plan.share(site.device).aliases}
    for tensor in memory.tensors.values():  # those who are late would read this
        tensor.fill_(float("nan"))
    assert all(shard.equal(expected[n]) for n, shard in arrived.shards.items() if n not in aliased)


def check_near_memory(rank, table, with_kernels):
    with pytest.MonkeyPatch.context() as patch:
        if not with_kernels and rank == 1:  # one without them is enough: then all wait by messages
            patch.setattr(signals, "kernels", lambda: None)
        for pair in PAIRS:
            move_by_near_memory(rank, pair, table)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_near_memory_would_give_other_bits(tmp_path, with_kernels):
    run_gang(NUM_PROCESSES, check_near_memory, tmp_path, tables()["tied"], with_kernels)


def test_near_memory_would_be_left_behind():
    memory = NearMemory.make(
        {"a": ((3, 2), torch.bfloat16), "b": ((0,), torch.float32), "c": ((5,), torch.float32)}
    )
    memory.tensors["c"].copy_(torch.arange(5.0))
    again = NearMemory.open(memory.where, {name: (tuple(t.shape), t.dtype) for name, t in memory.tensors.items()})
    assert again["c"].tolist() == [0, 1, 2, 3, 4]
    again["a"].fill_(2)
    assert memory.tensors["a"].tolist() == [[2, 2]] * 3
    file = memory.where[2]
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    assert memory.tensors["c"].sum() == 10
    assert not [path for path in Path("/dev/shm").iterdir() if "meshift" in path.name]
