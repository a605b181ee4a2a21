"""Seconds follow from counts that can be made another way: bytes of plans, operations, rings, lengths."""

from dataclasses import replace

import pytest
import torch
from tiny_families import MODELS
from tiny_tables import SIZES

from meshift.config.sections import LoraConfig, TrainableConfig
from meshift.layout.layout import Coordinates, Layout, Placement
from meshift.models.decoder import Decoder
from meshift.models.hf.adapter_targets import adapter_for
from meshift.models.hf.families import FAMILIES, read_config
from meshift.models.shards import shard_table
from meshift.planner.candidates import Problem
from meshift.planner.cost import Costs
from meshift.planner.hardware import KNOWN, as_values, from_values
from meshift.planner.memory import Memory
from meshift.planner.moving import Moving
from meshift.planner.uses import Use
from meshift.planner.workload import PlannedCall, Role, Step, Texts
from meshift.realloc.plan import plan, unchanged
from meshift.training.flops import training_flops
from meshift.training.optimizer import freeze, is_trained

H100 = KNOWN["h100"]
TEXTS = Texts(num_prompts=256, prompt=128, longest_prompt=128, completion=300, longest_completion=1024)


def llama(layers=32, hidden=4096, **changes):
    sizes = {"vocab_size": 32000, "hidden_size": hidden, "intermediate_size": 11008, "num_hidden_layers": layers}
    sizes |= {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "head_dim": 128,
    }
    raw = {"model_type": "llama", "architectures": [FAMILIES["llama"].causal], **sizes, **changes}
    return read_config(raw, "a test")


def actor(config=None, trained=True, **passes):
    given = TrainableConfig(max_tokens_per_micro_batch=8192, **passes)
    return Role(name="actor", config=config or llama(), head="lm", trained=trained, passes=given)


def call(kind, texts=TEXTS, **changes):
    return PlannedCall(name=kind, role="actor", kind=kind, texts=texts, num_read=texts.completion, **changes)


def seconds(kind, layout, texts=TEXTS, hardware=H100, role=None, **changes):
    return Costs(role or actor(), hardware).of(call(kind, texts, **changes), Layout.parse(layout))


def adapted(config, passes):
    if passes.lora is None:
        return config
    return replace(config, adapter=adapter_for(config, passes.lora, passes.num_frozen_layers))


PAIRS = [
    ("d2t2p1", "d4t1p1"),
    ("d1t2p2", "d2t2p1"),
    ("d4t1p1s", "d1t2p2"),
    ("d1t4p1", "d1t1p3"),
    ("d1t3p1", "d2t1p2s"),
]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("first", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "how", [{}, {"num_frozen_layers": 1}, {"lora": LoraConfig(rank=3)}], ids=["all", "frozen", "adapters"]
)
def test_what_moves_is_what_a_plan_of_reallocation_sends(name, first, pair, how):
    passes = TrainableConfig(**how)
    family, differs = MODELS[name]
    sizes = {**SIZES, "max_position_embeddings": 64, "num_hidden_layers": 3}
    raw = {"model_type": family, "architectures": [FAMILIES[family].causal], **sizes, **differs}
    config = adapted(read_config(raw, "a test"), passes)
    home, target = (Layout.parse(text) for text in pair)
    table = shard_table(config, "lm")
    frozen_names = [name for name in table if not is_trained(name, passes, "lm")]
    made = plan(
        Placement.parse(f"0-{home.num_ranks - 1}", pair[0]),
        Placement.parse(f"{first}-{first + target.num_ranks - 1}", pair[1]),
        table,
        leave_out=unchanged(dict.fromkeys(frozen_names, 0), dict.fromkeys(frozen_names, 0)),
    )
    role = Role(name="actor", config=config, head="lm", trained=True, passes=passes)
    found = Moving(Memory(role), H100).missing(home, target, first)
    assert 2 * found.total == made.wire_bytes
    assert 2 * found.most == max(made.received)


def test_moving_to_the_same_layout_on_the_same_devices_sends_nothing_and_elsewhere_all():
    moving = Moving(Memory(actor()), H100)
    layout = Layout.parse("d2t4p1")
    assert moving.missing(layout, layout, 0).total == 0
    elsewhere = moving.missing(layout, layout, None)
    assert elsewhere.total == 8 * elsewhere.most
    assert moving.seconds(layout, layout, None, far=True) > moving.seconds(layout, layout, None, far=False)


def test_training_takes_six_operations_for_each_weight_and_token():
    role = actor()
    cost = seconds("train", "d1t1p1", role=role)
    tokens = 256 * (128 + 300)
    weights = sum(s.num_elements for s in shard_table(role.config, "lm").values()) - 32000 * 4096
    least = 6 * weights * tokens / (H100.flops["bfloat16"] * H100.compute_share)
    assert least < cost.parts["compute"] < 1.35 * least


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_frozen_layers": 2},
        {"lora": LoraConfig(rank=8)},
        {"lora": LoraConfig(rank=8), "num_frozen_layers": 5},
    ],
    ids=["all", "frozen", "adapters", "adapters above"],
)
def test_training_is_planned_to_take_the_operations_that_the_engine_counts(how):
    """On a device whose memory takes no time, and with texts whose prompts are read as their completions are."""
    passes = TrainableConfig(max_tokens_per_micro_batch=1 << 20, **how)
    config = adapted(llama(layers=8, hidden=512, vocab_size=2000, tie_word_embeddings=True), passes)
    role = Role(name="actor", config=config, head="lm", trained=True, passes=passes)
    texts = Texts(num_prompts=16, prompt=1, longest_prompt=1, completion=255, longest_completion=255)
    endless = replace(H100, memory_rate=1e30, layer_delay=0.0)
    cost = seconds("train", "d1t1p1", texts=texts, hardware=endless, role=role)
    with torch.device("meta"):
        model = Decoder(config)
    freeze(model, passes)
    counted = training_flops(model, [(0, 256)] * 16, 255 * 16, 256 * 16)
    assert cost.parts["compute"] * H100.flops["bfloat16"] * H100.compute_share == pytest.approx(counted, rel=0.06)


WINDOWS = {"all": (), "windows": (256,) * 8, "every other": (200, None) * 4}


@pytest.mark.parametrize("windows", list(WINDOWS.values()), ids=list(WINDOWS))
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("prompt", "mean", "most", "each"), [(1024, 256, 2048, 2), (64, 2000, 16000, 1), (3000, 8, 8, 4)]
)
def test_long_texts_are_planned_to_take_the_operations_that_the_engine_counts(
    prompt, mean, most, each, share, windows
):
    """In a narrow model, of which attention is the most: texts of lengths from their distribution."""
    passes = TrainableConfig(max_tokens_per_micro_batch=1 << 20, share_prefixes=share)
    config = replace(llama(layers=8, hidden=128, vocab_size=500, intermediate_size=256), windows=windows)
    role = Role(name="actor", config=config, head="lm", trained=True, passes=passes)
    texts = Texts(
        num_prompts=16,
        per_prompt=each,
        prompt=prompt,
        longest_prompt=prompt,
        completion=mean,
        longest_completion=most,
    )
    endless = replace(H100, memory_rate=1e30, layer_delay=0.0)
    with torch.device("meta"):
        model = Decoder(config)
    given = Texts(**{**vars(texts), "num_prompts": 4000}).lengths(4000)
    scale = 16 * each / len(given)
    spans = [(prompt, n) for n in given]
    begun = [(0, prompt)] * round(16 * (1 if share else each) / scale)
    num_rows = sum(given) + prompt * len(begun)
    trained = scale * training_flops(model, [*begun, *spans], sum(given), num_rows)
    done = {kind: seconds(kind, "d1t1p1", texts=texts, hardware=endless, role=role) for kind in ("train", "infer")}
    rate = H100.flops["bfloat16"] * H100.compute_share
    assert done["train"].parts["compute"] * rate == pytest.approx(trained, rel=0.03)
    assert 2.5 < done["train"].parts["compute"] / done["infer"].parts["compute"] < 3.1


def test_going_back_takes_twice_the_operations_of_attention_that_a_pass_forward_takes():
    endless = replace(H100, memory_rate=1e30, layer_delay=0.0)
    costs = Costs(actor(llama(hidden=128)), endless)
    there, back = (costs._layer(kind, Layout(), 1e4, 1e5) for kind in ("forward", "backward"))
    assert back / there == pytest.approx(2)


def test_adapters_take_as_long_as_their_products_or_as_the_rows_that_pass_whichever_is_more():
    """By a datasheet: 4 r (in + out) operations a row, or reading and writing rows beside the matrices."""
    config, hardware = llama(hidden=512), replace(H100, layer_delay=0.0)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = 2 * (hidden + heads) + 2 * (hidden + keys) + 3 * (hidden + inner)
    rate, peak = H100.memory_rate * H100.memory_share, H100.flops["bfloat16"] * H100.compute_share
    rows, seen = 1e5, 100.0
    plain = Costs(actor(config), hardware)
    numbers = float(plain.memory.sizes.layer(Layout(), Coordinates(data=0, tensor=0, pipeline=0)))
    attention, passing = 4.0 * heads * rows * seen, 2 * rows * (8 * hidden + 4 * inner)
    without = {
        "forward": plain._layer("forward", Layout(), rows, seen),
        "backward": plain.rates.layer("frozen", numbers, rows, attention, passing),
    }
    for rank in (8, 4096):
        costs = Costs(actor(replace(config, adapter=adapter_for(config, LoraConfig(rank=rank)))), hardware)
        for kind, passes, times in (("forward", 2.5, 1), ("backward", 3.5, 2)):
            said = costs._layer(kind, Layout(), rows, seen) - without[kind]
            read = (passes * rows + times * rank) * width * 2 / rate
            multiplied = times * 2.0 * rank * width * rows / peak
            assert said == pytest.approx(max(read, multiplied), rel=1e-6)
            assert (multiplied > read) == (rank == 4096)


@pytest.mark.parametrize("first", [0, 2, 7])
def test_adapters_in_the_upper_layers_make_those_layers_dearer_and_no_others(first):
    """Of eight layers; generation multiplies by sums, which are as large as the matrices without adapters."""
    plain, lora = llama(layers=8, hidden=512), LoraConfig(rank=64)
    roles = {
        where: actor(replace(plain, adapter=None if where is None else adapter_for(plain, lora, where)))
        for where in (None, 0, first)
    }
    read = {where: seconds("infer", "d1t1p1", role=role).parts["compute"] for where, role in roles.items()}
    assert read[first] - read[None] == pytest.approx((read[0] - read[None]) * (8 - first) / 8)
    drawn = {where: seconds("generate", "d1t1p1", role=role).parts["decode"] for where, role in roles.items()}
    assert drawn[first] == pytest.approx(drawn[None])
    stages = seconds("infer", "d1t1p4", role=roles[first]).parts["compute"]
    assert stages > seconds("infer", "d1t1p4", role=roles[None]).parts["compute"]  # the last stage is the slowest


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_frozen_layers": 3},
        {"lora": LoraConfig(rank=8)},
        {"lora": LoraConfig(rank=8), "num_frozen_layers": 5},
    ],
    ids=["all", "frozen", "adapters", "adapters above"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_state_is_brought_together_where_passes_go_and_gradients_added_up_where_something_learns(
    how, tied
):
    """By bytes over a link without delays, with two micro-batches; a norm of 512 numbers is of no account."""
    passes = TrainableConfig(max_tokens_per_micro_batch=1024, **how)
    config = adapted(llama(layers=8, hidden=512, vocab_size=2000, tie_word_embeddings=tied), passes)
    role = Role(name="actor", config=config, head="lm", trained=True, passes=passes)
    texts = Texts(num_prompts=16, prompt=1, longest_prompt=1, completion=255, longest_completion=255)
    plain = replace(H100, near_rate=1e9, link_share=1.0, near_delay=0.0, near_hop=0.0)
    cost = seconds("train", "d2t1p1s", texts=texts, hardware=plain, role=role)
    table = shard_table(config, "lm")
    learns = {name for name in table if is_trained(name, passes, "lm")}
    lowest = min(shard.layer for name, shard in table.items() if name in learns and shard.layer is not None)
    sizes = {name: shard.num_elements for name, shard in table.items()}
    layers = {name: shard.layer for name, shard in table.items() if shard.layer is not None}
    there = 2 * (2 * sum(sizes[n] for n in layers) + sum(sizes[n] for n in sizes if n not in layers))
    back = 2 * 2 * sum(sizes[name] for name in layers if layers[name] >= lowest)
    added = 4 * (2 * sum(sizes[n] for n in layers if n in learns) + sum(sizes[n] for n in learns - layers.keys()))
    sent = cost.parts["gather"] * 1e9 * 2  # half of all is another's
    assert sent == pytest.approx(there + back + added, rel=0.01)


def test_reading_takes_a_third_of_learning():
    ratio = seconds("infer", "d1t1p1").parts["compute"] / seconds("train", "d1t1p1").parts["compute"]
    assert 0.25 < ratio < 0.34


def test_checkpointing_costs_a_forward_pass_more():
    once, again = (
        seconds("train", "d1t1p1", role=actor(gradient_checkpointing=on)).parts["compute"] for on in (False, True)
    )
    assert 1.25 < again / once < 1.34


def test_decoding_reads_all_weights_for_every_token():
    texts = Texts(num_prompts=1, prompt=8, longest_prompt=8, completion=100, longest_completion=100)
    cost = seconds("generate", "d1t1p1", texts)
    weights = sum(s.num_elements for s in shard_table(llama(), "lm").values()) - 32000 * 4096
    reading = 100 * weights * 2 / (H100.memory_rate * H100.memory_share)
    delays = 100 * 32 * H100.layer_delay
    assert reading + delays < cost.parts["decode"] < 1.1 * (reading + delays)


def test_a_growing_cache_makes_later_tokens_dearer():
    short, long = (
        seconds(
            "generate",
            "d1t1p1",
            Texts(num_prompts=256, prompt=8, longest_prompt=8, completion=n, longest_completion=n),
            num_slots=256,
        ).parts["decode"]
        for n in (512, 2048)
    )
    assert long > 1.5 * 4 * short


@pytest.mark.parametrize("layout", ["d1t2p1", "d1t8p1"])
def test_tensor_ranks_send_a_rings_bytes_of_rows_at_each_of_their_sums(layout):
    role, layout = actor(), Layout.parse(layout)
    costs = Costs(role, H100)
    given, t = call("infer"), layout.tensor
    num = costs.memory.num_micro_batches(given, layout)
    rows = TEXTS.num_rows(share_prefixes=True) / num
    sent = (t - 1) * rows * 4096 * 2 / t / (H100.near_rate * H100.link_share)
    ring = 2 * (sent + H100.near_delay + {2: 1, 8: 3}[t] * H100.near_hop)
    assert costs.of(given, layout).parts["tensor"] == pytest.approx(num * 65 * ring)


def test_small_messages_take_what_nccl_is_known_to_take():
    """Tens of microseconds within a host, a little more for twice the devices; across hosts by their doublings."""
    eight, two = (H100.sum_seconds(1e3, n, n) for n in (8, 2))
    assert 2e-5 < two < eight < 4e-5
    many, few = (H100.sum_seconds(1e3, 8 * n, 8 * n) for n in (128, 2))
    assert many - few == pytest.approx(2 * 6 * H100.far_hop, rel=0.1)


def test_tensor_groups_that_cross_hosts_are_costed_as_such_and_not_offered():
    role = actor(llama(num_attention_heads=24, num_key_value_heads=24, head_dim=128))
    within, across = (seconds("infer", name, role=role).parts["tensor"] for name in ("d2t3p1", "d8t3p1"))
    assert across > 2 * within / 4  # with a fourth of the rows each
    whole, crossing = (seconds("infer", name, role=role).parts["tensor"] for name in ("d6t4p1", "d8t3p1"))
    assert crossing > whole
    step = Step(roles={"actor": role}, calls=(call("infer"),))
    found = {layout.tensor for layout in Problem(step, H100, 24).layouts(Use("actor", "infer"))}
    assert found == {1, 2, 4, 8}
    assert 3 in {layout.tensor for layout in Problem(step, H100, 6).layouts(Use("actor", "infer"))}


def test_a_pipeline_idles_for_its_other_stages():
    parts = seconds("train", "d1t1p4").parts
    assert parts["bubbles"] / parts["compute"] == pytest.approx(3 / 16, rel=0.1)
    assert seconds("train", "d4t1p1").parts["bubbles"] == 0


def test_between_hosts_tensor_sums_take_longer_than_within():
    role = actor(llama(num_attention_heads=64, num_key_value_heads=64, head_dim=64))
    assert (
        seconds("train", "d1t16p1", role=role).parts["tensor"] > 1.3 * seconds("train", "d1t8p1").parts["tensor"]
    )


def test_a_faster_network_makes_only_what_crosses_hosts_faster():
    near, far = seconds("train", "d1t8p1"), seconds("train", "d16t1p1")
    faster = H100.changed(far_rate=2)
    assert seconds("train", "d1t8p1", hardware=faster).seconds == near.seconds
    assert 0.5 <= seconds("train", "d16t1p1", hardware=faster).parts["data"] / far.parts["data"] < 0.9


def test_a_description_of_hardware_survives_json():
    assert from_values(as_values(H100)) == H100
