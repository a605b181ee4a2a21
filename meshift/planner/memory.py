"""Bytes on each device: what roles keep through a step, and what each kind of call needs on top while it runs.

What is kept follows from the shard table and is exact. What a call needs on top follows `training/`, `generation/`
and `parallel/` as they are; measured activations are 0.8 to 1.1 of what is said here, and the peak of training a
real model 0.8 to 1.2 (`tests/planner/test_planned_memory.py`), with what a CPU's allocator keeps between them.
What generation had is freed when a rollout ends where a device has other calls, but for a cache of at most 256 MiB
(`runtime.role.KEPT_CACHE_BYTES`). That, a GPU allocator's fragments, the runtime's own memory and libraries are
not counted. It knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil

from meshift.graph.calls import Kind
from meshift.layout.layout import Coordinates, Layout, Placement
from meshift.layout.mesh import Device
from meshift.planner.sizes import Sizes
from meshift.planner.workload import PlannedCall, Role

FP32 = 4
MASTER_BYTES = {"float32": (0, 4, 8), "bfloat16": (4, 4, 8)}
"""Of a trained number beside its weight: its master (fp32 weights are their own), gradient and two moments."""
REDUCED_AT_ONCE = 1 << 24
"""Numbers of gradients in one message (`parallel.data.BUCKET`)."""
PREFILL_TOKENS = 4096
"""Of prompts in one pass (`generation.session.PREFILL_BUDGET`)."""
CACHE_STEP = 32
"""Cache lengths are multiples of this (`generation.cache.LENGTH_STEP`)."""
SLOT_STEP = 8
"""Slots are rounded up to this (`generation.session.ROW_STEP`)."""
MOVING_BYTES = 512 * 2**20
"""What waits to be sent or stored on a device while parameters move (`realloc.execute.MAX_BYTES`)."""
PER_STAGE = 4
"""Micro-batches for each pipeline stage (`training.pipelined.PER_STAGE`)."""
CPU_BLOCK_BYTES = {"float32": 50_000_000, "bfloat16": 100_000_000}
"""fp32 logits that exist at a time on a CPU (`training.token_logprobs`, `training.fused_logprobs`)."""
FREED_SHARE = 0.25
"""Of activations and logits, a CPU's heap has freed pieces between them that none of the next fits into: 0.15
with all weights trained, 0.28 beside adapters, more where they are few (`kernels.cpu.keep_freed_pages` keeps
them)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a device decides how memory is used. `packs`: generation multiplies by a copy of the weights (CPUs).

    `kernels`: the MLP keeps two matrices for its backward pass, not four (Meshift's CPU kernels, bfloat16).
    """

    packs: bool = False
    kernels: bool = False

    def block_rows(self, chunk: int, vocabulary: int, dtype: str) -> int:
        """Rows whose logits exist at a time."""
        if not self.packs:
            return chunk
        return max(1, min(chunk, max(256 * self.kernels, CPU_BLOCK_BYTES[dtype] // (FP32 * vocabulary))))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that a role keeps on a device through the step, by what they are."""

    weights: int = 0
    masters: int = 0
    gradients: int = 0
    moments: int = 0
    averages: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def leaving(self) -> int:
        """What is copied where the role leaves the device: gradients, all zeros then, are freed."""
        return self.total - self.gradients

    def __add__(self, other: Kept) -> Kept:
        return Kept(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Working:
    """Bytes that a call needs while it runs, beside what roles keep, by what they are.

    `heap`: freed pieces between those in use, of a CPU's process.
    """

    cache: int = 0
    copies: int = 0
    logits: int = 0
    activations: int = 0
    gathered: int = 0
    reduction: int = 0
    heap: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, one.name) for one in fields(self))


class Memory:
    """Of one role. `where` is always the coordinates of a rank in `layout`."""

    def __init__(self, role: Role, machine: Machine | None = None) -> None:
        self.role = role
        self.machine = machine or Machine()
        frozen = role.num_frozen_layers
        self.sizes = Sizes(role.config, role.head, trained=role.trained, num_frozen_layers=frozen)

    def kept(self, layout: Layout, where: Coordinates) -> Kept:
        """By the rank, where the role lives: weights, and what its optimizer and its averages keep."""
        if self.role.borrows:
            return Kept()
        held = self.sizes.held(layout, where)
        master, gradient, moments = MASTER_BYTES[self.role.dtype]
        averages = FP32 if self.role.averaged and self.role.dtype != "float32" else 0
        return Kept(
            weights=held.total * self.role.width,
            masters=held.trained * master,
            gradients=held.trained * gradient,
            moments=held.trained * moments,
            averages=held.total * averages,
        )

    def copy(self, home: Layout, at_home: Coordinates | None, other: Layout, there: Coordinates) -> Kept:
        """By a device that also stands in another placement: the weights that are not the home's own tensors."""
        return Kept(weights=self.sizes.kept_twice(home, at_home, other, there) * self.role.width)

    def on_device(self, placements: Mapping[Kind, Placement], device: Device) -> Kept:
        """All that one device keeps of the role, whose calls have these placements."""
        home = placements.get("train") or next(iter(placements.values()))
        rank = home.mesh.rank_of(device)
        at_home = None if rank is None else home.layout.coordinates(rank)
        found = Kept() if at_home is None else self.kept(home.layout, at_home)
        for other in dict.fromkeys(placements.values()):
            rank = other.mesh.rank_of(device)
            if other != home and rank is not None:
                there = other.layout.coordinates(rank)
                found += self.copy(home.layout, at_home, other.layout, there)
        return found

    def working(self, call: PlannedCall, layout: Layout, where: Coordinates) -> Working:
        """By a rank of the call."""
        if call.kind == "generate":
            return self._generating(call, layout, where)
        return self._learning(call, layout, where) if call.kind == "train" else self._reading(call, layout, where)

    def _generating(self, call: PlannedCall, layout: Layout, where: Coordinates) -> Working:
        """Cache of the slots, packed weights, and a pass over prompts or over all slots."""
        config, width = self.role.config, self.role.width
        own = ceil(call.texts.num_sequences / layout.data)
        sessions = min(layout.pipeline, own)
        slots = sessions * _up(min(max(1, call.num_slots // sessions), ceil(own / sessions)), SLOT_STEP)
        num_layers = len(layout.stage_layers(config.num_layers)[where.pipeline])
        heads = _part(config.num_kv_heads, layout.tensor)
        length = _up(call.texts.longest, CACHE_STEP)
        rows = max(
            slots // sessions, min(PREFILL_TOKENS, own * call.texts.longest_prompt), call.texts.longest_prompt
        )
        # Every tensor rank draws: from whole rows, a copy of them in fp32, and their exponentials.
        part = _part(config.vocab_size, layout.tensor) * (layout.tensor > 1)
        logits = slots // sessions * (config.vocab_size * (width + 2 * FP32) + part * width)
        held = self.sizes.held(layout, where)
        return Working(
            cache=2 * num_layers * slots * heads * length * config.head_dim * width,
            copies=self.packed(layout, where) if self.machine.packs else self.summed(layout, where),
            logits=logits if where.pipeline == layout.pipeline - 1 else 0,
            activations=ceil(rows * self._passing(layout)),
            gathered=(self._whole(layout, where) - held.total) * width if layout.sharded else 0,
        )

    def packed(self, layout: Layout, where: Coordinates) -> int:
        """Bytes of the matrices of layers and head once more."""
        whole = Layout(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
        embedding = _part(self.role.config.vocab_size, layout.tensor) * self.role.config.hidden_size
        ends = where.pipeline == layout.pipeline - 1
        untied = where.pipeline == 0 and not (ends and self.role.config.tie_word_embeddings)
        numbers = self.sizes.held(whole, where).total - self.sizes.adapters(whole, where)
        return (numbers - embedding * untied) * self.role.width

    def summed(self, layout: Layout, where: Coordinates) -> int:
        """Bytes of matrices with their adapters in them, once more, where nothing is packed."""
        whole = Layout(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
        return self.sizes.summed(whole, where) * self.role.width

    def _whole(self, layout: Layout, where: Coordinates) -> int:
        """Numbers of the rank's stage, with what data ranks share out brought together."""
        whole = Layout(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
        return self.sizes.held(whole, where).total

    def _reading(self, call: PlannedCall, layout: Layout, where: Coordinates) -> Working:
        rows = self.micro_batch_rows(call, layout)
        return Working(
            logits=self._logits(call, layout, where, rows, learning=False),
            activations=ceil(rows * self._passing(layout)),
            gathered=self._gathered(layout, where, learning=False),
        )

    def _learning(self, call: PlannedCall, layout: Layout, where: Coordinates) -> Working:
        """A micro-batch's passes, or, if that is more, bringing gradients together and stepping.

        Layers under the lowest that learns keep nothing for a backward pass, but with checkpointing their inputs.
        """
        rows, width, config = self.micro_batch_rows(call, layout), self.role.width, self.role.config
        here = layout.stage_layers(config.num_layers)[where.pipeline]
        num_learned = max(0, here.stop - max(here.start, self.role.num_frozen_layers))
        flights = min(layout.pipeline - where.pipeline, self.num_micro_batches(call, layout))
        each = self.saved_numbers(layout) * width
        inputs = config.hidden_size * width
        if self.role.passes.gradient_checkpointing:
            kept = flights * (len(here) + 1) * inputs + each * (num_learned > 0)  # and what leaves
        else:
            kept = flights * (num_learned * each + inputs)
        largest = self.sizes.largest(layout, where)
        passes = Working(
            logits=self._logits(call, layout, where, rows, learning=True),
            activations=ceil(rows * (kept + self._passing(layout))),
            gathered=self._gathered(layout, where, learning=True),
            reduction=largest * width,  # a parameter's gradient before it is added to the others
        )
        if self.machine.packs:
            passes = replace(passes, heap=ceil(FREED_SHARE * (passes.activations + passes.logits)))
        trained = self.sizes.held(layout, where).trained
        bucket = FP32 * min(trained, max(REDUCED_AT_ONCE, largest)) * (layout.data > 1 and not layout.sharded)
        norm = 16 * largest * (layout.num_ranks > 1)  # `Ranks.norm`: a gradient and its squares, in fp64
        stepping = Working(reduction=max(bucket, norm))
        return max(passes, stepping, key=lambda one: one.total)

    def buffers(self, home: Layout, target: Layout, *, mixing: bool = False) -> int:
        """Bytes on a device that wait to be sent or stored while weights move (in fp32, where they are mixed).

        None on a CPU: there a receiver reads what others hold.
        """
        if self.machine.packs:
            return 0
        ends = ((layout, layout.coordinates(layout.num_ranks - 1)) for layout in (home, target))
        held = [self.sizes.held(*end) for end in ends]
        numbers = sum(one.total if mixing else one.trained for one in held)
        return min(MOVING_BYTES, numbers * (FP32 if mixing else self.role.width))

    def micro_batch_rows(self, call: PlannedCall, layout: Layout) -> int:
        """Rows of the largest micro-batch: the budget, or what there is of the call, or one long sequence."""
        rows = self._rows_of_update(call, layout)
        most = min(self.role.passes.max_tokens_per_micro_batch, rows)
        if layout.pipeline > 1:
            most = min(most, rows / (PER_STAGE * layout.pipeline))
        return ceil(max(most, min(rows, call.texts.longest)))

    def num_micro_batches(self, call: PlannedCall, layout: Layout) -> int:
        """Of one update, or of one reading."""
        return max(1, ceil(self._rows_of_update(call, layout) / self.micro_batch_rows(call, layout)))

    def num_passes(self, call: PlannedCall, layout: Layout) -> int:
        """As `num_micro_batches`, with texts of mean length: what time goes by."""
        rows = self._rows_of_update(call, layout)
        most = min(self.role.passes.max_tokens_per_micro_batch, rows)
        if layout.pipeline > 1:
            most = min(most, ceil(rows / (PER_STAGE * layout.pipeline)))
        texts = ceil(call.texts.num_sequences / (call.num_updates * layout.data))
        return max(1, min(ceil(rows / most), texts))

    def _rows_of_update(self, call: PlannedCall, layout: Layout) -> float:
        rows = call.texts.num_rows(share_prefixes=self.role.passes.share_prefixes)
        return max(1.0, rows / (call.num_updates * layout.data))

    def saved_numbers(self, layout: Layout) -> float:
        """Numbers that a layer keeps of a row for its backward pass.

        Both norms' inputs and outputs (4 hidden), queries, keys, values, what was attended, twice with padding
        between, and of the MLP gate, its activation, up and their product (two of them without a gate). Beside
        adapters the inputs of linear layers that have none are not kept, and each adapter keeps its middle.
        """
        config, tensor = self.role.config, layout.tensor
        queries, keys = (_part(n, tensor) * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        heads = queries + 2 * keys + 2 * queries
        if config.query_key_norm is not None:
            heads += queries + keys
        norms = 2 + self._keeps_input("query", "key", "value") + self._keeps_input("gate", "up")
        norms += 2 * (config.norm_places == "both")
        columns = _part(config.intermediate_size, tensor) * self._saved_columns()
        fp32 = 3 + _part(config.num_heads, tensor)  # norms' scales, attention's normalisers
        middle = 0 if config.adapter is None else config.adapter.rank * len(config.adapter.targets)
        return norms * config.hidden_size + heads + columns + middle + fp32 * FP32 / self.role.width

    def _keeps_input(self, *names: str) -> bool:
        """Whether what these linear layers read is kept: for their own gradients, or those of adapters beside."""
        adapter = self.role.config.adapter
        return adapter is None or any(target.rpartition(".")[2] in names for target in adapter.targets)

    def _saved_columns(self) -> int:
        """Matrices of the MLP's width that are kept."""
        product = self._keeps_input("down")
        if self.machine.kernels and self.role.config.gated_mlp:
            return 2 + (product and self.role.config.adapter is not None)
        return (3 if self.role.config.gated_mlp else 1) + product

    def _passing(self, layout: Layout) -> float:
        """Bytes of a row while one layer runs, forward or backward: attention or MLP, whichever has more."""
        config, tensor = self.role.config, layout.tensor
        queries, keys = (_part(n, tensor) * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        attending = 2 * (queries + keys) + queries
        columns = (4 if config.gated_mlp else 2) * _part(config.intermediate_size, tensor)
        return self.role.width * (3 * config.hidden_size + max(attending, columns))

    def _logits(self, call: PlannedCall, layout: Layout, where: Coordinates, rows: int, *, learning: bool) -> int:
        """Logits of a block and what is made of them; rows that are read; the projection's gradient."""
        config, width = self.role.config, self.role.width
        if self.role.head != "lm" or where.pipeline < layout.pipeline - 1:
            return 0
        all_rows = max(1.0, call.texts.num_rows(share_prefixes=self.role.passes.share_prefixes))
        read = min(rows, ceil(rows * call.num_read * call.texts.num_sequences / all_rows))
        vocabulary = _part(config.vocab_size, layout.tensor)
        block = min(read, self.machine.block_rows(self.role.passes.logits_chunk, vocabulary, self.role.dtype))
        slopes = 2 * read * config.hidden_size * width if learning else 0
        return block * vocabulary * (2 * FP32 + width) + slopes

    def _gathered(self, layout: Layout, where: Coordinates, *, learning: bool) -> int:
        """What `s` brings together: embedding and head for the call, a layer at a time; in a pipeline all of it.

        A layer is there twice while parts arrive; gradients in fp32, and once more while they are sent.
        """
        if not layout.sharded or layout.data == 1:
            return 0
        own, whole = self.sizes.held(layout, where), self._whole(layout, where)
        layer = self.sizes.layer(layout, where)
        num_layers = len(layout.stage_layers(self.sizes.num_layers)[where.pipeline])
        rest = whole - num_layers * layer
        there = whole if layout.pipeline > 1 else rest + layer
        gradients = FP32 * (there + 2 * max(layer, rest)) if learning and own.trained else 0
        return (there + max(layer, rest)) * self.role.width + gradients


def _part(count: int, num_parts: int) -> int:
    """The largest of `num_parts` parts; at least one."""
    return max(1, ceil(count / num_parts))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
