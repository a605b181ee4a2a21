"""Data ranks that share out weights, gradients and moments give one device's readings, updates and troubles."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from gang import Cases, run_gang
from test_ranks import CONFIG, READING, SAMPLING, assert_batches_agree, place_in, prompts, role_of, rollouts
from tiny_families import MODELS, family_model
from tiny_rl import tiny_model

from meshift.algorithms.losses import PolicyLoss
from meshift.batch import Ragged
from meshift.errors import NonFiniteError
from meshift.layout.boxes import boxes_of, held_box
from meshift.layout.layout import Layout
from meshift.layout.shard import Shard
from meshift.models.shards import shard_table
from meshift.parallel.gathered import Group, rows_of
from meshift.parallel.tensor import cut_model
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainTask

LAYOUTS = ("d2t1p1s", "d4t1p1s", "d3t1p1s", "d2t2p1s", "d1t2p1s")
ALL_TRAINED = CONFIG.model_copy(update={"num_frozen_layers": 0})
TASK = TrainTask(loss=PolicyLoss(reading=READING), num_epochs=1, num_mini_batches=2)
ONE = TrainTask(loss=PolicyLoss(reading=READING))
# What differs from the settings of `test_ranks` (a layer frozen, micro-batches of two or three rows).
SETTINGS = {
    "nothing frozen": {"num_frozen_layers": 0},
    "layers computed again": {"gradient_checkpointing": True},
    "most frozen": {"num_frozen_layers": 3},
    "a row a micro-batch": {"max_tokens_per_micro_batch": 1, "num_frozen_layers": 0, "share_prefixes": False},
}


def story(role, batches):
    """What a role reads, learns, and reads then."""
    before = role.infer(READING, batches[0]).batch
    metrics = [role.train(TASK, batch, step=step).metrics for step, batch in enumerate(batches)]
    return before, metrics, role.infer(READING, batches[0]).batch


def check_story(role, expected, batches, what):
    found = story(role, batches)
    for ours, theirs in zip(found[::2], expected[::2], strict=True):
        assert_batches_agree(ours, theirs, what)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        wrong = {k: (ours[k], v) for k, v in theirs.items() if k in ours and not is_close(ours[k], v)}
        assert not wrong, f"{what}: {wrong}"
        assert "actor/grad_norm" in ours


def is_close(ours, theirs):
    return math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-6)


def own_part(weights, role, place):
    """This rank's box of every parameter of one device."""
    boxes = boxes_of(place.layout, shard_table(role.model.config, role.model.head_kind), place.rank)
    return {name: weights[name][tuple(slice(*side) for side in box)] for name, box in boxes.items()}


def check_weights(role, whole, place, what):
    held = role.master_weights()
    parts = own_part(whole.master_weights(), role, place)
    assert held.keys() == parts.keys()
    for name, part in parts.items():
        assert held[name].shape == part.shape
        size = 1 + float(part.abs().max()) if part.numel() else 1.0
        assert torch.allclose(held[name], part, atol=1e-5 * size, rtol=0), f"{what}: {name}"


def check_families(rank, num_ranks, layouts):
    batches = [rollouts(seed) for seed in range(2)]
    for name in MODELS:
        expected = story(whole := role_of(name, None, ALL_TRAINED), batches)
        for layout in layouts:
            place = place_in(layout, rank, num_ranks)
            if place is not None:
                role = role_of(name, place, ALL_TRAINED)
                check_story(role, expected, batches, f"{name} {layout}")
                check_weights(role, whole, place, f"{name} {layout}")


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("d2t1p1s",), ("d8t1p1s", "d4t2p1s")])
def test_two_and_eight_ranks_would_learn_otherwise(layouts, tmp_path):
    run_gang(8, check_families, tmp_path, 8, layouts)


def check_settings(rank):
    batches = [rollouts(seed) for seed in range(2)]
    for what, settings in SETTINGS.items():
        config = CONFIG.model_copy(update=settings)
        expected = story(whole := role_of("llama-biases", None, config), batches)
        for layout in LAYOUTS if what == "nothing frozen" else ("d3t1p1s", "d2t2p1s"):
            place = place_in(layout, rank)
            if place is not None:
                role = role_of("llama-biases", place, config)
                check_story(role, expected, batches, f"{what}, {layout}")
                check_weights(role, whole, place, f"{what}, {layout}")


def check_few_rows(rank):
    whole, place = role_of("qwen2", None), place_in("d4t1p1s", rank)
    ours, batches = role_of("qwen2", place), [rollouts().index([0, 1]), rollouts(1).index([3])]
    check_story(ours, story(whole, batches), batches, "few rows")
    check_weights(ours, whole, place, "few rows")


class Stopping(PolicyLoss):
    """Stops a step before its second update."""

    def __init__(self):
        super().__init__(reading=READING)
        object.__setattr__(self, "seen", [])

    def stop_reason(self, stats):
        self.seen.append(stats)
        return "enough" if len(self.seen) == 2 else None


def check_trouble(rank, layout):
    batch = rollouts()
    bad = batch["advantages"].values.clone()
    bad[0] = math.nan  # one rank's, in one of its micro-batches
    worse = replace(batch, fields={**batch.fields, "advantages": Ragged(bad, batch["advantages"].lengths)})
    place = place_in(layout, rank)
    whole, role = role_of("llama-tied", None), role_of("llama-tied", place)
    before = {name: weight.clone() for name, weight in role.master_weights().items()}
    with pytest.raises(NonFiniteError, match="the loss is nan in 1 of"):
        role.train(ONE, worse, step=0)
    assert all(torch.equal(weight, before[name]) for name, weight in role.master_weights().items())
    assert not any(m.grad is not None and m.grad.any() for m in role.trainer.optimizer.masters)
    assert_freed(role)
    stopped = [one.train(replace(TASK, loss=Stopping()), batch, step=0).metrics for one in (whole, role)]
    assert all(one["actor/early_stop"] == 1.0 for one in stopped)
    assert whole.version == role.version == 1
    check_story(role, story(whole, [batch]), [batch], "after trouble")  # nobody is out of step
    check_weights(role, whole, place, "after trouble")


def assert_freed(role):
    """Nothing of others' rows is here."""
    for name, parameter in role.model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    groups = [*role.trainer.passes._layers, role.trainer.passes._rest]
    assert not any(slot.whole.untyped_storage().nbytes() for group in groups for slot in group.slots)
    assert not any(slot.whole.grad is not None or slot.gradient is not None for g in groups for slot in g.slots)


def check_memory(rank, dtype):
    whole = role_of("qwen2", None, ALL_TRAINED, dtype, num_layers=4)
    num_whole = sum(p.numel() for p in whole.model.parameters())
    place = place_in("d4t1p1s", rank)
    role = role_of("qwen2", place, ALL_TRAINED, dtype, num_layers=4)
    layers, most = role.trainer.passes._layers, []
    gather = Group.gather

    def counted(group, **options):
        gather(group, **options)
        most.append(sum(any(s.whole.untyped_storage().nbytes() for s in one.slots) for one in layers))

    Group.gather = counted
    role.train(ONE, rollouts(), step=0)
    role.infer(READING, rollouts())
    Group.gather = gather
    assert max(most) == 1  # layer that is here at a time
    assert_freed(role)
    rows = [len(p) for p in whole.model.parameters()]
    most_kept = sum(-(-n // 4) * p.numel() // n for n, p in zip(rows, whole.model.parameters(), strict=True))
    assert most_kept < 0.27 * num_whole
    tensors = role.trainer.state().tensors
    for kind in ("master/", "exp_avg/", "exp_avg_sq/"):
        kept = [tensor.numel() for name, tensor in tensors.items() if name.startswith(kind)]
        assert len(kept) == len(rows)
        assert sum(kept) <= most_kept, kind
    assert sum(m.grad.numel() for m in role.trainer.optimizer.masters) <= most_kept
    everyone = [torch.zeros(()) for _ in range(4)]
    torch.distributed.all_gather(everyone, torch.tensor(float(sum(p.numel() for p in role.model.parameters()))))
    assert sum(everyone) == num_whole  # nobody has what another has


def even_role(place):
    model = tiny_model(vocab_size=62, hidden_size=32, tied=True, dtype=torch.bfloat16)
    return LocalRole(
        "actor", cut_model(model, place.tensor), ALL_TRAINED, trainable=True, max_steps=3, place=place
    )


def check_bfloat16(rank):
    """With kernels, which add gradients into buffers themselves (`even`), and without for odd sizes."""
    for name in ("even", "qwen2", "gpt2"):
        for layout in ("d2t1p1", "d2t2p1"):
            places = place_in(layout, rank), place_in(f"{layout}s", rank)
            if places[0] is None:
                continue
            make = even_role if name == "even" else partial(role_of, name, dtype=torch.bfloat16)
            plain, ours = map(make, places)
            batch = rollouts()
            read = [role.infer(READING, batch).batch["new_logprobs"].values for role in (ours, plain)]
            assert torch.equal(*read), (name, layout)  # the same weights, brought together, in the same kernels
            found, expected = (role.train(ONE, batch, step=0).metrics for role in (ours, plain))
            assert math.isclose(found["actor/pg_loss"], expected["actor/pg_loss"], rel_tol=1e-6), (name, layout)
            assert math.isclose(found["actor/grad_norm"], expected["actor/grad_norm"], rel_tol=1e-3), (
                name,
                layout,
            )
            theirs = own_part_of_plain(plain, ours, places[1])
            for parameter, weight in ours.master_weights().items():
                assert weight.dtype == (torch.float32 if parameter in trained(ours) else torch.bfloat16)
                assert torch.allclose(weight, theirs[parameter], atol=2e-4, rtol=1e-3), (name, layout, parameter)


def check_rollouts(rank):
    """Of a role that only generates: nothing of the whole model is kept in between."""
    place, expected = place_in("d3t1p1s", rank), role_of("phi3", None).generate(SAMPLING, prompts())
    if place is None:
        return
    role = LocalRole("actor", family_model("phi3"), CONFIG, place=place).can_generate(3, str)
    for _ in range(2):
        assert_batches_agree(role.generate(SAMPLING, prompts()).batch, expected.batch, "sampled")
        assert role.generator.num_packed_bytes == 0
        assert_freed(role)


def trained(role):
    return {name for name, p in role.model.named_parameters() if p.requires_grad}


def own_part_of_plain(plain, ours, place):
    """Of what a rank has in the layout with copies, what it has in the sharded one."""
    parts = {}
    for name, weight in plain.master_weights().items():
        start, stop = rows_of(len(weight), place.layout.data)[place.coordinates.data]
        parts[name] = weight[start:stop]
    assert parts.keys() == ours.master_weights().keys()
    return parts


def check_bits(rank):
    """d3, whose ranks are the mesh's in another order than the world's."""
    place = place_in("d3t1p1s", rank, mesh="2,0,1")
    if place is None:
        return
    one, other = (role_of("gemma2", place) for _ in range(2))
    for step in range(3):
        for role in (one, other):
            role.train(TASK, rollouts(step), step=step)
    assert all(torch.equal(w, other.master_weights()[name]) for name, w in one.master_weights().items())
    whole = role_of("gemma2", None)
    for step in range(3):
        whole.train(TASK, rollouts(step), step=step)
    check_weights(one, whole, place, "another order")


IN_TROUBLE = ("d4t1p1s", "d2t2p1s")
DTYPES = (torch.float32, torch.bfloat16)
CASES = {
    "families": (check_families, 4, ("d4t1p1s", "d2t2p1s")),
    "settings": (check_settings,),
    "few rows": (check_few_rows,),
    **{f"trouble: {layout}": (check_trouble, layout) for layout in IN_TROUBLE},
    **{f"memory: {dtype}": (check_memory, dtype) for dtype in DTYPES},
    "rollouts": (check_rollouts,),
    "bfloat16": (check_bfloat16,),
    "bits": (check_bits,),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return Cases(4, tmp_path_factory.mktemp("gang"), CASES)


def test_a_family_would_learn_otherwise_when_its_state_is_shared_out(sharded):
    """Of d2t1p1s, the least of the layouts, `settings` holds one family, `test_ranks` three, a slow test all."""
    sharded.check("families")


def test_frozen_layers_checkpointing_and_uneven_micro_batches_would_be_of_another_model(sharded):
    sharded.check("settings")


def test_ranks_without_a_row_would_be_waited_for(sharded):
    sharded.check("few rows")


@pytest.mark.parametrize("layout", IN_TROUBLE)
def test_a_rank_in_trouble_would_be_waited_for(sharded, layout):
    sharded.check(f"trouble: {layout}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rank_would_keep_more_than_its_share(sharded, dtype):
    sharded.check(f"memory: {dtype}")


def test_a_rollout_would_keep_the_whole_model(sharded):
    sharded.check("rollouts")


def test_bfloat16_would_differ_from_copies_of_the_model(sharded):
    sharded.check("bfloat16")


def test_the_same_run_would_give_other_bits(sharded):
    sharded.check("bits")


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 61])
@pytest.mark.parametrize("num_peers", [1, 2, 3, 4, 5, 8])
def test_rows_would_not_be_those_of_the_layout(num_rows, num_peers):
    shard, layout = Shard(shape=(num_rows, 2), split=None, stage="head"), Layout(data=num_peers, sharded=True)
    boxes = [held_box(shard, layout, layout.coordinates(rank))[0] for rank in range(num_peers)]
    assert rows_of(num_rows, num_peers) == boxes
    chunks = [len(chunk) for chunk in torch.zeros(num_rows).chunk(num_peers)]
    assert [stop - start for start, stop in boxes] == chunks + [0] * (num_peers - len(chunks))
