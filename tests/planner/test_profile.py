"""A profile says what was measured, between sizes in logarithms; processes that share processors are slower."""

import json
from dataclasses import replace
from itertools import product as pairs

import pytest
from tiny_steps import device, step

from meshift.config.sections import LoraConfig, TrainableConfig
from meshift.errors import ConfigError
from meshift.layout.layout import Coordinates, Layout, Placement
from meshift.models.hf.adapter_targets import adapter_for
from meshift.planner.candidates import Problem
from meshift.planner.cost import Costs
from meshift.planner.evaluate import evaluate
from meshift.planner.hardware import as_values, find_hardware
from meshift.planner.planning import make_plan
from meshift.planner.profile import PRODUCTS, SPEEDS, Message, Product, Profile
from meshift.planner.search import score, search
from meshift.planner.timeline import Spot, timeline
from meshift.planner.uses import Use
from meshift.planner.written import placements_of

RATE = 1e10
SLOW = {"1": 1.0, "2": 1.0, "4": 2.0}


def profile(cores=2, dtype="bfloat16", slow=SLOW, rate=RATE):
    """Everything at one rate; messages of a tenth of a millisecond and 1 GB/s."""
    return Profile(
        products=tuple(
            Product(kind=kind, dtype=dtype, threads=threads, numbers=numbers, rows=rows, rate=threads * rate)
            for kind, threads, numbers, rows in pairs(PRODUCTS, (1, 2), (1e5, 1e7), (1, 1024))
        ),
        messages=tuple(
            Message(kind=kind, members=n, among=n, num_bytes=size, seconds=1e-4 + size / 1e9)
            for kind, n, size in pairs(("sum", "late", "gather", "send"), (2, 4), (1e3, 1e9))
        ),
        speeds={f"{kind}/{dtype}": {"1": 1e9, "2": 2e9} for kind in SPEEDS},
        crowding=dict.fromkeys(("decode", "forward", "backward", "update"), slow),
        cores=cores,
    )


def shared(**changes):
    """A host of two processors."""
    values = as_values(device()) | {"profile": profile(**changes).values(), "memory": 64e9}
    from meshift.planner.hardware import from_values

    return from_values(values)


def lines(points):
    """Products of one kind and size."""
    return Profile(
        products=tuple(
            Product(kind="forward", dtype="float32", threads=1, numbers=1e6, rows=rows, rate=rate)
            for rows, rate in points
        )
    )


def test_a_size_between_two_is_interpolated_in_logarithms_and_beyond_them_the_nearest_speaks():
    found = lines([(10, 1e9), (1000, 4e9)])

    def rate(rows):
        return found.rate("forward", "float32", 1, 1e6, rows)

    assert rate(10) == pytest.approx(1e9)
    assert rate(100) == pytest.approx(2e9)
    assert rate(1000) == rate(5000) == pytest.approx(4e9)
    # Fewer rows than were measured take as long as these: a pass reads all weights.
    assert 5 / rate(5) == pytest.approx(10 / rate(10))


def test_matrices_of_a_size_between_two_have_a_rate_between_theirs():
    found = Profile(
        products=tuple(
            Product(kind="forward", dtype="float32", threads=1, numbers=numbers, rows=8, rate=rate)
            for numbers, rate in ((1e4, 1e9), (1e6, 9e9))
        )
    )
    assert found.rate("forward", "float32", 1, 1e5, 8) == pytest.approx(3e9)


def test_a_message_larger_than_all_measured_takes_as_many_times_longer():
    found = profile()
    assert found.message("send", 1e3, 2, 2) == pytest.approx(1e-4 + 1e-6)
    assert found.message("send", 4e9, 2, 2) == pytest.approx(4 * (1e-4 + 1.0))


def test_more_processes_than_were_measured_share_what_there_is():
    found = profile()
    assert [found.slow("decode", n) for n in (1, 2, 3, 4, 8)] == pytest.approx([1, 1, 1.5, 2, 4])


def test_a_profile_is_read_from_the_file_that_it_was_written_to(tmp_path):
    hardware, file = shared(), tmp_path / "profile.json"
    file.write_text(json.dumps(as_values(hardware)))
    found = find_hardware(str(file))
    assert as_values(found) == as_values(hardware)
    assert found.profile.rate("decode", "bfloat16", 2, 1e6, 7) == pytest.approx(2 * RATE)


def test_adapters_of_a_rank_between_two_that_were_measured_take_a_time_between_theirs():
    """Passes over rows, 2 ms, come at any rank; products take 1/16 ms for each of it."""
    width, rows = 1e4, 100

    def seconds(rank):
        return 2e-3 + rank / 16e3

    found = Profile(
        products=tuple(
            Product(
                kind="beside",
                dtype="float32",
                threads=1,
                numbers=part * rank * width,
                rows=rows,
                rate=2 * rank * width * rows / seconds(rank),
                rank=rank,
            )
            for rank in (16, 64)
            for part in (0.5, 1)
        )
    )
    for rank in (1, 8, 16, 32, 64, 256):
        assert found.adapters("beside", "float32", 1, width, rows, rank) == pytest.approx(seconds(rank))
    again = Profile.of(json.loads(json.dumps(found.values())))
    assert again.adapters("beside", "float32", 1, width / 2, rows, 40) == pytest.approx(seconds(40) / 2)


def test_adapters_are_counted_as_they_were_measured_and_else_at_the_rate_of_the_layer():
    role = replace(step().roles["critic"], passes=TrainableConfig(lora=LoraConfig(rank=8)))
    role = replace(role, config=replace(role.config, adapter=adapter_for(role.config, LoraConfig(rank=8))))
    call = next(one for one in step().calls if one.name == "train_critic")
    old, width = profile(), 4 * (1024 + 1024) + 3 * (1024 + 3072)
    values = old.values()
    for one in values["products"]:
        del one["rank"]  # as it was written before
    assert Profile.of(values) == old

    def layer(kind, given):
        hardware = replace(shared(), profile=given).shared_by(2)
        return Costs(role, hardware)._layer(kind, Layout(), 100.0, 10.0)

    numbers, attention = 4 * 1024**2 + 3 * 1024 * 3072 + 2 * 1024, 4.0 * 1024 * 100 * 10
    passed = {"forward": 2.5, "backward": 3.5}
    for kind, products in (("forward", numbers + 8 * width), ("backward", numbers / 2 + 8 * width)):
        said = (2.0 * products * 100 + attention) / RATE + passed[kind] * 100 * width * 2 / 2 / 1e9
        assert layer(kind, old) == pytest.approx(said)
    # Measured: back through frozen matrices at a tenth of the rate, adapters a hundredth.
    extra = [
        Product(kind=kind, dtype="bfloat16", threads=1, numbers=1e6, rows=100, rate=rate, rank=rank)
        for kind, rank, rate in (
            ("frozen", 0, RATE / 10),
            ("beside", 8, RATE / 100),
            ("beside_back", 8, RATE / 100),
        )
    ]
    new = replace(old, products=(*old.products, *extra))
    narrow = 2.0 * 8 * width * 100 / (RATE / 100)
    assert layer("forward", new) == pytest.approx((2.0 * numbers * 100 + attention) / RATE + narrow)
    assert layer("backward", new) == pytest.approx((2.0 * numbers * 100 + attention) / (RATE / 10) + narrow)
    assert call.kind == "train"


def test_a_decode_step_reads_the_cache_that_it_was_measured_with_once():
    """Of 40 tokens, 32 were there when layers were measured, with their attention."""
    role = step().roles["actor"]
    costs = Costs(role, shared().shared_by(2))
    numbers = costs.memory.sizes.layer(Layout(), Coordinates(data=0, tensor=0, pipeline=0))
    whole = (2.0 * numbers * 4 + 4.0 * 1024 * 4 * 32) / RATE + 2 * 4 * 8 * 1024 * 2 / 1e9
    head = costs._head("draw", Layout(), 4)
    assert costs._decode_step(Layout(), 4, 4 * 40)[0] == pytest.approx(role.config.num_layers * whole + head)


def test_a_type_that_was_not_measured_is_named():
    with pytest.raises(ConfigError, match=r"has bfloat16, and nothing of forward in float32.*--dtype float32"):
        profile().rate("forward", "float32", 1, 1e6, 8)
    with pytest.raises(ConfigError, match="update in float32"):
        profile().speed("update", "float32", 1)


def test_one_process_has_all_processors_and_each_of_several_its_share():
    hardware = shared(cores=4)
    assert [hardware.shared_by(n).threads for n in (1, 2, 3, 4, 8)] == [4, 2, 1, 1, 1]
    assert hardware.shared_by(4).usable < hardware.shared_by(2).usable / 1.9


def test_reading_takes_the_operations_of_its_layers_by_the_rate():
    given = step()
    call = next(one for one in given.calls if one.name == "values")
    cost = Costs(given.roles["critic"], shared().shared_by(2)).of(call, Layout())
    role = given.roles["critic"]
    numbers = sum(
        4 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024  # queries to output, gate to down, norms
        for _ in range(role.config.num_layers)
    )
    rows = call.texts.num_rows(share_prefixes=False)
    lengths = [call.texts.prompt + length for length in call.texts.lengths(20000)]
    pairs = sum(length * (length + 1) / 2 for length in lengths) * call.texts.num_sequences / len(lengths)
    attention = 4.0 * 1024 * pairs * role.config.num_layers
    assert cost.parts["compute"] == pytest.approx((2.0 * numbers * rows + attention) / RATE, rel=1e-3)


def test_frozen_layers_are_not_gone_back_through():
    def training(frozen):
        given = step(num_frozen_layers=frozen)
        call = next(one for one in given.calls if one.name == "train_critic")
        return Costs(given.roles["critic"], shared().shared_by(2)).of(call, Layout()).parts["compute"]

    assert training(1) / training(0) == pytest.approx((1 + 2) / (2 + 2), rel=0.01)  # at one rate for both ways


APART = {
    "actor": {"generate": ("0-1", "d2t1p1"), "train": ("0-1", "d2t1p1")},
    "critic": {"infer": ("2-3", "d2t1p1"), "train": ("2-3", "d2t1p1")},
    "reference": {"infer": ("2-3", "d2t1p1")},
}


def played(hardware, where=APART):
    placements = {
        role: {kind: Placement.parse(*given) for kind, given in kinds.items()} for role, kinds in where.items()
    }
    return {event.name: event for event in evaluate(step(), hardware, placements, streaming=False)}


def test_calls_side_by_side_on_the_same_processors_take_as_long_as_their_work_together():
    """Four processes on two processors: at half speed while both calls run, then the rest alone."""
    events = played(shared())
    actor, critic = events["train_actor"], events["train_critic"]
    alone = {name: events[name].cost.seconds for name in ("train_actor", "train_critic")}
    begun = max(actor.start, critic.start)
    assert actor.start == pytest.approx(critic.start)
    shorter, longer = sorted(alone.values())
    ends = sorted((actor.end - begun, critic.end - begun))
    assert ends == pytest.approx([2 * shorter, shorter + longer], rel=1e-6)


def test_calls_side_by_side_on_devices_of_their_own_do_not_slow_each_other():
    events = played(shared(cores=0))
    for name in ("train_actor", "train_critic"):
        assert events[name].end - events[name].start == pytest.approx(events[name].cost.seconds)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_the_searches_timeline_is_the_evaluators(streaming, apart):
    given, hardware = step(), shared()
    problem = Problem(given, hardware, 4, streaming=streaming)
    half = Layout(data=2)
    firsts = {"actor": 0, "critic": 2 * apart, "reference": 2 * apart}
    choice = {use: Spot(problem.candidate(use, half), firsts[use.role]) for use in problem.uses}
    if apart:  # the actor draws elsewhere too
        use = Use("actor", "generate")
        choice[use] = Spot(problem.candidate(use, Layout(tensor=2)), 0)
    bars = {bar.op.name: bar for bar in timeline(problem, choice)}
    events = evaluate(given, hardware, placements_of(problem, choice), streaming=streaming)
    for event in events:
        tolerance = 0.02 * max(one.end for one in events)
        assert bars[event.name].start == pytest.approx(event.start, abs=tolerance), event.name
        assert bars[event.name].end == pytest.approx(event.end, abs=tolerance), event.name


def test_where_processes_only_get_in_each_others_way_the_plan_is_one_process():
    planned = make_plan(step(), shared(slow={"1": 1.0, "2": 2.5, "4": 6.0}), 4, seconds=1.0)
    assert planned.problem.num_devices == 1
    many = make_plan(step(), shared(rate=RATE, cores=0), 4, seconds=1.0)
    assert len({spot.first for spot in many.choice.values()} | {s.stop for s in many.choice.values()}) > 1


def eight(**changes):
    """A host of eight processors, on which more threads of one process are ever less use."""
    found = shared(cores=8, slow={"1": 1.0, "2": 1.0, "4": 1.6, "8": 3.0})
    profile = found.profile
    alone = [one for one in profile.products if one.threads == 1]
    products = (replace(one, threads=t, rate=1e10 * t**0.8) for t in (1, 2, 4, 8) for one in alone)
    speeds = {kind: {"1": 1e9, "2": 2e9, "4": 3e9, "8": 4e9} for kind in profile.speeds}
    return replace(found, profile=replace(profile, products=tuple(products), speeds=speeds))


def test_every_number_of_processes_is_tried_and_the_bound_is_of_all_of_them():
    planned = make_plan(step(), eight(), 8, seconds=4)
    by_count = {}
    for count in (1, 2, 4):
        problem = Problem(step(), eight(), count)
        by_count[count] = score(problem, search(problem, seconds=1)).seconds
    assert min(by_count, key=by_count.get) == 2
    assert planned.seconds <= by_count[2] * 1.001
    assert planned.proof.bound <= min(by_count.values())
