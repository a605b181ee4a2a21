"""What roles keep is counted as real tensors and boxes are; what calls need is near what is measured."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_families import MODELS, family_model
from tiny_steps import device, llama, step
from tiny_tables import SIZES

from meshift.config.sections import LoraConfig, TrainableConfig
from meshift.generation.cache import KVCache
from meshift.generation.sampler import draw_by_block
from meshift.layout.boxes import boxes_of, num_elements
from meshift.layout.layout import Coordinates, Layout, Placement
from meshift.layout.mesh import Device
from meshift.models.adapters import add_adapter
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.decoder import Decoder
from meshift.models.hf.adapter_targets import adapter_for
from meshift.models.hf.families import FAMILIES, read_config
from meshift.models.shards import is_adapters, shard_table
from meshift.planner.evaluate import evaluate, peak_bytes
from meshift.planner.memory import MOVING_BYTES, Machine, Memory
from meshift.planner.sizes import Sizes
from meshift.planner.workload import PlannedCall, Role, Texts
from meshift.realloc.execute import MAX_BYTES
from meshift.training.optimizer import MasterAdamW, freeze, is_frozen, is_trained

LAYOUTS = ("d1t1p1", "d2t2p1", "d1t3p2", "d3t1p1s", "d2t2p3s", "d1t6p1")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIRST = Coordinates(data=0, tensor=0, pipeline=0)


def tiny_config(name, num_layers=3):
    family, differs = MODELS[name]
    sizes = {**SIZES, "max_position_embeddings": 64, "num_hidden_layers": num_layers}
    return read_config(
        {"model_type": family, "architectures": [FAMILIES[family].causal], **sizes, **differs}, "a test"
    )


def adapted(config, passes):
    if passes.lora is None:
        return config
    return replace(config, adapter=adapter_for(config, passes.lora, passes.num_frozen_layers))


def wide_config(name="llama", **changes):
    """Wide enough for what is kept in fp32 beside a row to be little, as in real models."""
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 688, "head_dim": 32, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 4, "max_position_embeddings": 512, "num_hidden_layers": 3, **changes}
    return read_config({"model_type": name, "architectures": [FAMILIES[name].causal], **sizes}, "a test")


def role(config, head="lm", dtype="bfloat16", frozen=0, trained=True, **passes):
    given = TrainableConfig(num_frozen_layers=frozen, **passes)
    return Role(name="actor", config=config, head=head, dtype=dtype, trained=trained, passes=given)


def call(kind="train", num_prompts=8, completion=32, per_prompt=1, **changes):
    texts = Texts(
        num_prompts=num_prompts,
        prompt=16,
        longest_prompt=16,
        completion=completion,
        longest_completion=completion,
        per_prompt=per_prompt,
    )
    return PlannedCall(name="call", role="actor", kind=kind, texts=texts, num_read=completion, **changes)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3)], ids=["whole", "adapters"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(MODELS))
def test_every_rank_is_counted_to_hold_what_its_boxes_hold(name, layout, lora):
    given = TrainableConfig(num_frozen_layers=2, lora=lora)
    config, layout = adapted(tiny_config(name), given), Layout.parse(layout)
    if layout.tensor > config.num_heads:
        pytest.skip("the layout cuts no such model")
    for head in ("lm", "value"):
        table = shard_table(config, head)
        sizes = Sizes(config, head, trained=True, num_frozen_layers=2)
        assert sizes.frozen_names == [name for name in table if not is_trained(name, given, head)]
        for rank in range(layout.num_ranks):
            boxes = {name: num_elements(box) for name, box in boxes_of(layout, table, rank).items()}
            frozen = sum(count for name, count in boxes.items() if not is_trained(name, given, head))
            where = layout.coordinates(rank)
            assert sizes.held(layout, where) == (frozen, sum(boxes.values()) - frozen)
            assert sizes.adapters(layout, where) == sum(n for name, n in boxes.items() if is_adapters(name))
            beside = (name.rpartition(".")[0] for name in boxes if name.endswith("lora_a"))
            assert sizes.summed(layout, where) == sum(boxes[f"{name}.weight"] for name in beside)


@pytest.mark.parametrize(
    "pair", [("d2t2p1", "d4t1p1"), ("d1t2p2", "d2t2p1"), ("d4t1p1s", "d1t2p2"), ("d1t2p2", "d1t2p2")]
)
@pytest.mark.parametrize("mesh", ["0-3", "2-5", "3,2,1,0"])
@pytest.mark.parametrize("name", ["llama-biases", "llama-tied"])
def test_a_second_placement_takes_the_boxes_that_the_first_has_not(name, mesh, pair):
    config = tiny_config(name)
    home, other = Placement.parse("0-3", pair[0]), Placement.parse(mesh, pair[1])
    memory = Memory(role(config, dtype="float32", frozen=1))
    table = shard_table(config, "lm")
    for index in range(6):
        device, expected = Device(index=index), 0
        mine, theirs = (p.mesh.rank_of(device) for p in (home, other))
        held = {} if mine is None else boxes_of(home.layout, table, mine)
        for parameter, box in held.items():
            expected += num_elements(box) * (4 if is_frozen(parameter, 1) else 16)
        if home != other:
            for parameter, box in ({} if theirs is None else boxes_of(other.layout, table, theirs)).items():
                same = held.get(parameter) == box and not is_frozen(parameter, 1)
                expected += 0 if same else 4 * num_elements(box)
        assert memory.on_device({"train": home, "generate": other}, device).total == expected


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3)], ids=["whole", "adapters"])
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "gpt2"])
def test_weights_masters_gradients_and_moments_are_those_of_a_real_optimizer(name, dtype, frozen, lora):
    model = family_model(name, num_layers=3, dtype=TYPES[dtype])
    if lora is not None:
        add_adapter(model, adapter_for(model.config, lora, frozen)).to(TYPES[dtype])
    given = role(model.config, dtype=dtype, frozen=frozen, lora=lora)
    freeze(model, given.passes)
    optimizer = MasterAdamW(model, given.passes)
    hidden = model(torch.arange(6), packed_positions([6]), PackedAttention([6]))
    model.head(hidden).sum().backward()
    optimizer.step(1e-3)
    own = {p.data_ptr() for p in model.parameters()}
    masters = [m for m in optimizer.masters if m.data_ptr() not in own]
    moments = [t for t in optimizer.held()[len(optimizer.masters) :] if t.dim()]
    found = Memory(given).kept(Layout(), FIRST)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.masters == sum(m.nbytes for m in masters)
    assert found.gradients == sum(g.nbytes for g in optimizer.gradients())
    assert found.moments == sum(t.nbytes for t in moments)
    assert found.total == found.weights + found.masters + found.gradients + found.moments


def test_a_role_that_follows_another_keeps_fp32_averages_beside_bfloat16_weights():
    config = tiny_config("llama-tied")
    frozen = Role(name="reference", config=config, head="lm", averaged=True)
    found = Memory(frozen).kept(Layout(), FIRST)
    assert (found.averages, found.masters, found.moments) == (2 * found.weights, 0, 0)


@pytest.mark.parametrize("slots", [3, 8, 64])
def test_the_cache_has_the_shape_that_generation_gives_it(slots):
    model = family_model("llama-tied", num_layers=3)
    given = call("generate", num_prompts=20, num_slots=slots)
    found = Memory(role(model.config, dtype="float32")).working(given, Layout(), FIRST)
    shape = KVCache.shape(model, -(-min(slots, 20) // 8) * 8, 16 + 32)
    assert found.cache == 2 * 4 * torch.Size(shape).numel()


def test_the_cache_of_a_rank_covers_its_heads_its_layers_and_its_sequences():
    whole = Memory(role(wide_config(num_hidden_layers=4)))
    given = call("generate", num_prompts=64, num_slots=64)
    alone = whole.working(given, Layout(), FIRST).cache
    assert whole.working(given, Layout.parse("d1t2p1"), FIRST).cache == alone / 2
    assert whole.working(given, Layout.parse("d2t1p1"), FIRST).cache == alone / 2
    assert whole.working(given, Layout.parse("d1t1p2"), FIRST).cache == alone / 2


def runs_kernels(dtype):
    from meshift.kernels.cpu import kernels, products_for

    return kernels() is not None and products_for(torch.zeros(1, dtype=TYPES[dtype])) is not None


def saved_bytes(config, lengths, dtype=torch.float32, checkpoint=False, passes=None):
    """What autograd keeps of the layers of a model, by storages that are no weights."""
    model = Decoder(config).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.adapter is None or is_adapters(name))
    if passes is not None:
        freeze(model, passes)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = torch.zeros(sum(lengths), dtype=torch.int64)
        out = model(tokens, packed_positions(lengths), PackedAttention(lengths), checkpoint=checkpoint)
    assert out.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lengths", [[128], [96, 80, 80, 70], [128, 40, 100]])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_activations_kept_for_the_backward_pass_are_as_predicted(name, lengths):
    config = wide_config(name)
    predicted = sum(lengths) * 3 * 4 * Memory(role(config, dtype="float32")).saved_numbers(Layout())
    # Without padding less is kept than predicted, and a group of sequences is padded by a quarter at most.
    assert 0.8 < saved_bytes(config, lengths) / predicted < 1.1


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_activations_beside_adapters_are_kept_as_predicted(dtype, modules):
    passes = TrainableConfig(lora=LoraConfig(rank=16, target_modules=modules))
    config, lengths = adapted(wide_config(), passes), [96, 80, 80]
    machine = Machine(kernels=runs_kernels(dtype))
    each = Memory(role(config, dtype=dtype), machine).saved_numbers(Layout())
    predicted = sum(lengths) * 3 * TYPES[dtype].itemsize * each
    assert 0.8 < saved_bytes(config, lengths, TYPES[dtype]) / predicted < 1.1


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=16)], ids=["whole", "adapters"])
def test_layers_under_the_lowest_that_learns_keep_nothing(lora):
    """Six layers, of which two learn: by what autograd keeps, and by what all of them would."""
    passes = TrainableConfig(num_frozen_layers=4, lora=lora)
    config, rows = adapted(wide_config(num_hidden_layers=6), passes), 128
    given, frozen = call(num_prompts=1, completion=112), replace(role(config, dtype="float32"), passes=passes)
    each = rows * 4 * Memory(frozen).saved_numbers(Layout())
    every = replace(frozen, passes=passes.model_copy(update={"num_frozen_layers": 0}))
    whole, some = (Memory(one).working(given, Layout(), FIRST).activations for one in (every, frozen))
    assert whole - some == pytest.approx(4 * each, rel=1e-6)
    assert 0.8 < saved_bytes(config, [rows], passes=passes) / (2 * each) < 1.1
    assert saved_bytes(config, [rows], checkpoint=True, passes=passes) > 6 * rows * 256 * 4  # inputs all the same


def test_bfloat16_kernels_keep_two_matrices_of_the_mlp():
    config, lengths = wide_config(), [96, 80, 80]
    if not runs_kernels("bfloat16"):
        pytest.skip("this machine multiplies by torch")
    predicted = sum(lengths) * 3 * 2 * Memory(role(config), Machine(kernels=True)).saved_numbers(Layout())
    assert 0.8 < saved_bytes(config, lengths, torch.bfloat16) / predicted < 1.1


def test_with_checkpointing_layers_keep_their_input_alone():
    config, rows = wide_config(num_hidden_layers=6), 128
    given = call(num_prompts=1, completion=112)
    with_all, inputs = (
        Memory(role(config, dtype="float32", gradient_checkpointing=on)).working(given, Layout(), FIRST)
        for on in (False, True)
    )
    each = rows * 4 * Memory(role(config, dtype="float32")).saved_numbers(Layout())
    assert with_all.activations - inputs.activations == pytest.approx(5 * each - 6 * rows * 256 * 4, rel=1e-6)
    with_norm = 7 * rows * 256 * 4  # the final norm keeps its input too
    assert saved_bytes(config, [rows], checkpoint=True) == pytest.approx(with_norm, rel=0.05)


def test_the_first_of_several_stages_keeps_the_most_micro_batches():
    memory = Memory(role(wide_config(num_hidden_layers=8), gradient_checkpointing=True))
    layout, given = Layout.parse("d1t1p4"), call(num_prompts=256)
    assert memory.num_micro_batches(given, layout) == 16
    stages = [memory.working(given, layout, Coordinates(data=0, tensor=0, pipeline=s)) for s in range(4)]
    kept = [stage.activations for stage in stages]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    steps = {one - other for one, other in pairwise(kept)}
    assert steps == {
        memory.micro_batch_rows(given, layout) * 3 * 256 * 2
    }  # inputs of its two layers, and what leaves


def test_sharded_ranks_bring_one_layer_together_at_a_time_but_in_a_pipeline_all():
    config = wide_config(num_hidden_layers=8)
    memory, given = Memory(role(config)), call()
    alone = memory.working(given, Layout.parse("d4t1p1"), FIRST)
    sharded = memory.working(given, Layout.parse("d4t1p1s"), FIRST)
    stages = memory.working(given, Layout.parse("d2t1p2s"), FIRST)
    layer = sum(s.num_elements for s in shard_table(config, "lm").values() if s.layer == 0)
    assert alone.gathered == 0
    assert 2 * layer * 2 < sharded.gathered < 8 * layer * 2 + 12 * layer
    assert stages.gathered >= 4 * layer * (2 + 4)
    inferring = memory.working(call("infer"), Layout.parse("d4t1p1s"), FIRST)
    assert inferring.gathered < sharded.gathered


def test_micro_batches_are_counted_with_prompts_that_run_once():
    together = Memory(role(tiny_config("llama-tied"), max_tokens_per_micro_batch=10_000))
    apart = Memory(role(tiny_config("llama-tied"), max_tokens_per_micro_batch=10_000, share_prefixes=False))
    given = call(num_prompts=4, per_prompt=8)
    assert together.micro_batch_rows(given, Layout()) == 4 * 16 + 32 * 32
    assert apart.micro_batch_rows(given, Layout()) == 32 * (16 + 32)
    assert apart.micro_batch_rows(given, Layout.parse("d4t1p1")) == 8 * (16 + 32)
    assert (
        Memory(role(tiny_config("llama-tied"), max_tokens_per_micro_batch=10)).micro_batch_rows(given, Layout())
        == 48
    )


MODEL = Path.home() / ".cache/meshift/derived/smollm2-135m-instruct"
MEASURED = """
import re, sys, torch
from meshift.algorithms.losses import PolicyLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.models.adapters import add_adapter
from meshift.models.hf.adapter_targets import adapter_for
from meshift.models.hf.load import load_model
from meshift.training.engine import TrainingEngine, TrainTask
from meshift.training.readings import TokenLogprobs

def read(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

model = load_model(sys.argv[1], head="lm", dtype=torch.float32)
config = TrainableConfig.model_validate_json(sys.argv[2])
if config.lora is not None:
    add_adapter(model, adapter_for(model.config, config.lora))
before = read("VmRSS") - sum(p.nbytes for p in model.parameters())
engine = TrainingEngine(model, config, trainable=True)
whole, completion = torch.full((8,), 256), torch.full((8,), 192)
ids = torch.randint(0, 40000, (8 * 256,))
floats = {key: Ragged(torch.randn(8 * 192) - 5, completion) for key in ("logprobs", "advantages")}
lengths = Ragged.scalars(completion)
batch = Batch({"tokens": Ragged(ids, whole), "completion_lengths": lengths, **floats})
loss = PolicyLoss(reading=TokenLogprobs(key="new_logprobs"), max_importance_ratio=None)
engine.train(TrainTask(loss=loss, num_epochs=2), batch, rate=1e-5, seed=0)
print(read("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="SmolLM2-135M is not in the cache")
@pytest.mark.parametrize(
    "how", [{}, {"gradient_checkpointing": True}, {"lora": LoraConfig()}], ids=["all", "checkpointing", "adapters"]
)
def test_training_a_real_model_takes_the_memory_that_was_predicted(how):
    passes = TrainableConfig(max_tokens_per_micro_batch=2048, **how)
    script = [sys.executable, "-c", MEASURED, str(MODEL), passes.model_dump_json()]
    measured = int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    config = adapted(read_config(json.loads((MODEL / "config.json").read_text()), "a test"), passes)
    given = Role(name="actor", config=config, head="lm", dtype="float32", trained=True, passes=passes)
    memory = Memory(given, Machine(packs=True))
    texts = Texts(num_prompts=8, prompt=64, longest_prompt=64, completion=192, longest_completion=192)
    given = PlannedCall(name="train", role="actor", kind="train", texts=texts, num_passes=2, num_read=192)
    predicted = memory.kept(Layout(), FIRST).total + memory.working(given, Layout(), FIRST).total
    assert 0.8 < measured / predicted < 1.2


def test_buffers_of_moves_are_those_of_the_runtime_and_in_the_peak_of_a_move():
    assert MOVING_BYTES == MAX_BYTES
    large, small = Memory(role(llama(layers=12, hidden=2048))), Memory(role(tiny_config("llama-tied")))
    one, two = Layout(data=2), Layout(tensor=2)
    assert large.buffers(one, two) == MOVING_BYTES
    held = [small.sizes.held(layout, layout.coordinates(1)).trained for layout in (one, two)]
    assert small.buffers(one, two) == 2 * sum(held)
    assert small.buffers(one, two, mixing=True) == 4 * sum(held)
    assert Memory(large.role, Machine(packs=True)).buffers(one, two) == 0
    given, where = step("grpo"), Placement.parse("0-1", "d2t1p1")
    placed = {
        "actor": {"train": where, "generate": Placement.parse("0-1", "d1t2p1")},
        "reference": {"infer": where},
    }
    peaks = peak_bytes(given, device(), placed)
    actor = Memory(given.roles["actor"])
    resident = sum(
        Memory(given.roles[name]).on_device(placed[name], where.mesh.devices[0]).total for name in placed
    )
    assert peaks["actor to generate"] == resident + actor.buffers(where.layout, Layout(tensor=2))


def test_ranks_that_draw_hold_whole_rows_of_logits_in_fp32_with_what_is_made_of_them():
    """As `Sampler.draw` does: what the head gave, brought together, a copy, and exponentials."""
    memory = Memory(role(wide_config(vocab_size=32000)))
    given = call("generate", num_prompts=64, num_slots=64)
    alone, parted = (memory.working(given, Layout(tensor=t), FIRST).logits for t in (1, 4))
    assert alone == 64 * 32000 * (2 + 4 + 4)
    assert parted == alone + 64 * 8000 * 2
    head = torch.randn(64, 32000).to(torch.bfloat16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        scores = head.to(torch.float32, copy=True)
        draw_by_block(scores, torch.rand(64, dtype=torch.float64))
    made = [event.cpu_memory_usage for event in found.events() if event.name.startswith("aten::empty")]
    assert [size for size in made if size > 64 * 32000] == [64 * 32000 * 4] * 2


def test_gradients_of_a_role_that_leaves_the_device_are_freed_not_copied():
    kept = Memory(role(tiny_config("llama-tied"))).kept(Layout(), FIRST)
    assert kept.leaving == kept.weights + kept.masters + kept.moments
    away, here = (step("grpo", gradient_checkpointing=True) for _ in range(2))
    away = replace(away, roles={name: replace(one, offloaded=True) for name, one in away.roles.items()})
    placed = {"actor": dict.fromkeys(("train", "generate"), Placement.parse("0", "d1t1p1"))}
    placed["reference"] = {"infer": Placement.parse("0", "d1t1p1")}
    ends = {
        name: {event.name: event.end - event.start for event in evaluate(one, device(), placed)}
        for name, one in (("away", away), ("here", here))
    }
    copied = 2 * Memory(here.roles["actor"]).kept(Layout(), FIRST).leaving / device().host_rate
    assert ends["away"]["train_actor"] - ends["here"]["train_actor"] == pytest.approx(copied)
