"""Seconds of a model call in a layout: what is computed, what is read from memory, what is sent.

Each operation takes as long as its products or its bytes, whichever is more (Williams et al. 2009, the roofline
model), and communication comes on top: the runtime waits for it. Counts follow `training/`, `generation/` and
`parallel/` as they are. It knows nothing of meshes beyond how far a layout's groups reach, or of other calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from meshift.layout.layout import Coordinates, Layout
from meshift.planner.decoding import course
from meshift.planner.hardware import Hardware
from meshift.planner.memory import FP32, PREFILL_TOKENS, Memory
from meshift.planner.workload import PlannedCall, Role

BATCH_BYTES = 16
"""Of a token in a batch: its id and two or three floats."""
UPDATE_BYTES = 46
"""Read and written for each trained number: gradient's norm and clipping, AdamW, the rounded weight, zeros."""
HEAD_PASSES = 4
"""Products of the head's size in learning: logits, slopes, logits again, the projection's gradient."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a call by what they go to. `late` is the share of rows that end in a generation's last tenth."""

    parts: Mapping[str, float] = field(default_factory=dict)
    late: float = 1.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())


class Costs:
    """Of one role's calls on one kind of device."""

    def __init__(self, role: Role, hardware: Hardware, memory: Memory | None = None) -> None:
        self.role, self.hardware = role, hardware
        self.memory = memory or Memory(role, hardware.machine)
        self._peak = hardware.flops[role.dtype] * hardware.compute_share
        self._rate = hardware.memory_rate * hardware.memory_share

    def of(self, call: PlannedCall, layout: Layout) -> Cost:
        """The whole call, all of its passes and updates, by its slowest rank."""
        if call.kind == "generate":
            return self._generating(call, layout)
        return self._learning(call, layout) if call.kind == "train" else self._reading(call, layout)

    def _products(self, numbers: float, rows: float, more: float = 0.0) -> float:
        """Rows through matrices of so many numbers, and `more` operations."""
        by_operations = (2.0 * numbers * rows + more) / self._peak
        return max(by_operations, numbers * self.role.width / self._rate)

    def _layer(self, layout: Layout, rows: float, seen: float) -> float:
        """One layer's forward pass over rows that see `seen` tokens each, without communication."""
        config = self.role.config
        attention = 4.0 * config.num_heads / layout.tensor * config.head_dim * rows * seen
        passing = rows * self.role.width * (8 * config.hidden_size + 4 * config.intermediate_size / layout.tensor)
        numbers = self.memory.sizes.layer(layout, _first(layout))
        return self._products(numbers, rows, attention) + passing / self._rate + self.hardware.layer_delay

    def _head(self, layout: Layout, rows: float) -> float:
        if self.role.head != "lm":
            return 0.0
        numbers = self.role.config.vocab_size * self.role.config.hidden_size / layout.tensor
        return (
            self._products(numbers, rows)
            + 3 * FP32 * rows * self.role.config.vocab_size / layout.tensor / self._rate
        )

    def _tensor_sum(self, layout: Layout, rows: float) -> float:
        """One all-reduce of rows over tensor ranks."""
        return self.hardware.sum_seconds(self._row_bytes(rows), layout.tensor, layout.tensor)

    def _row_bytes(self, rows: float) -> float:
        return rows * self.role.config.hidden_size * self.role.width

    def _pass_on(self, layout: Layout, rows: float) -> float:
        """Rows to the next stage, whose rank is as many devices away as a stage has."""
        if layout.pipeline == 1:
            return 0.0
        far = layout.num_ranks > self.hardware.per_host
        return self.hardware.send_seconds(self._row_bytes(rows), far=far)

    def _stages(self, layout: Layout) -> list[tuple[int, bool]]:
        """Layers of each kind of stage, and whether it has the head."""
        counts = [len(layers) for layers in layout.stage_layers(self.role.config.num_layers)]
        return sorted({(count, stage == len(counts) - 1) for stage, count in enumerate(counts)})

    def _joining(self, call: PlannedCall, layout: Layout) -> float:
        """Every rank is sent the batch by one process, and data ranks bring their rows of the outcome together."""
        num_bytes = BATCH_BYTES * call.texts.num_rows(share_prefixes=False)
        joined = self.hardware.gather_seconds(num_bytes, layout.data, layout.data * layout.tensor)
        if call.kind == "generate":  # prompts are little
            return joined
        rate, delay = self.hardware.rate_between(layout.num_ranks)
        return joined + layout.num_ranks * num_bytes / rate + delay

    # Reading and learning

    def _reading(self, call: PlannedCall, layout: Layout) -> Cost:
        rows, num = self._rows(call, layout), self.memory.num_micro_batches(call, layout)
        read, seen = self._read(call, rows), call.texts.prompt + call.texts.completion / 2
        forward = max(
            layers * self._layer(layout, rows, seen) + last * self._head(layout, read)
            for layers, last in self._stages(layout)
        )
        sums = (2 * self._most_layers(layout) + 1) * self._tensor_sum(layout, rows)
        turns = num + layout.pipeline - 1
        return Cost(
            {
                "compute": num * forward,
                "bubbles": (layout.pipeline - 1) * forward,
                "tensor": turns * sums,
                "pipeline": turns * self._pass_on(layout, rows),
                "gather": self._gathers(layout, num, learning=False),
                "batch": self._joining(call, layout),
            }
        )

    def _learning(self, call: PlannedCall, layout: Layout) -> Cost:
        rows, num = self._rows(call, layout), self.memory.num_micro_batches(call, layout)
        read, seen = self._read(call, rows), call.texts.prompt + call.texts.completion / 2
        again = self.role.passes.gradient_checkpointing
        learned = 1 - self.role.num_frozen_layers / self.role.config.num_layers
        passes = 1 + learned * (2 + again)
        both = max(
            layers * passes * self._layer(layout, rows, seen) + last * HEAD_PASSES * self._head(layout, read)
            for layers, last in self._stages(layout)
        )
        sums = (2 * self._most_layers(layout) * (2 + again) + 2) * self._tensor_sum(layout, rows)
        turns = num + layout.pipeline - 1
        updates = call.num_updates * call.num_passes
        where = _first(layout)
        trained = self.memory.sizes.held(layout, where).trained
        reduced = 0.0
        if not layout.sharded:
            span = layout.data * layout.tensor
            reduced = (
                self.hardware.sum_seconds(FP32 * trained, layout.data, span) + 2 * FP32 * trained / self._rate
            )
        parts = {
            "compute": num * both,
            "bubbles": (layout.pipeline - 1) * both,
            "tensor": turns * sums,
            "pipeline": 2 * turns * self._pass_on(layout, rows),
            "gather": self._gathers(layout, num, learning=True),
            "data": reduced if layout.data > 1 else 0.0,
            "update": trained * UPDATE_BYTES / self._rate,
        }
        found = {name: updates * seconds for name, seconds in parts.items()}
        return Cost({**found, "batch": self._joining(call, layout)})

    def _rows(self, call: PlannedCall, layout: Layout) -> float:
        """Of a mean micro-batch: all have nearly as many."""
        rows = call.texts.num_rows(share_prefixes=self.role.passes.share_prefixes)
        each = rows / (call.num_updates * layout.data)
        return max(1.0, each / self.memory.num_micro_batches(call, layout))

    def _read(self, call: PlannedCall, rows: float) -> float:
        all_rows = call.texts.num_rows(share_prefixes=self.role.passes.share_prefixes)
        return rows * call.num_read * call.texts.num_sequences / max(1.0, all_rows)

    def _most_layers(self, layout: Layout) -> int:
        return max(layers for layers, _ in self._stages(layout))

    def _gathers(self, layout: Layout, num: int, *, learning: bool) -> float:
        """What `s` brings together and adds up: each layer in each pass, the rest once; in a pipeline all once."""
        if not layout.sharded or layout.data == 1:
            return 0.0
        layers, span = self._most_layers(layout), layout.data * layout.tensor
        layer = self.memory.sizes.layer(layout, _first(layout))
        whole = self.memory.sizes.held(
            Layout(tensor=layout.tensor, pipeline=layout.pipeline), _first(layout)
        ).total
        rest, turns = max(0, whole - layers * layer), 1 if layout.pipeline > 1 else num

        def gather(numbers: float, width: int) -> float:
            return self.hardware.gather_seconds(numbers * width, layout.data, span)

        forward = turns * layers * gather(layer, self.role.width) + gather(rest, self.role.width)
        if not learning:
            return forward
        backward = (layout.pipeline == 1) * turns * layers * gather(layer, self.role.width)
        return forward + backward + turns * layers * gather(layer, FP32) + gather(rest, FP32)

    # Generation

    def _generating(self, call: PlannedCall, layout: Layout) -> Cost:
        """As many sessions as stages take turns: each stage runs all of them once for every token."""
        own = max(1, ceil(call.texts.num_sequences / layout.data))
        sessions = min(layout.pipeline, own)
        slots = max(1, min(call.num_slots // sessions, ceil(own / sessions)))
        going = course(call.texts, ceil(own / sessions), slots)
        parts = {"decode": 0.0, "tensor": 0.0, "pipeline": 0.0}
        for span in going.spans:
            turns = span.steps * layout.pipeline
            parts["decode"] += turns * self._decode_step(layout, span.live, span.cached)
            sums = 2 * self._most_layers(layout) + 2
            parts["tensor"] += turns * sums * self._tensor_sum(layout, span.live)
            parts["pipeline"] += turns * self._pass_on(layout, span.live)
        prefill, tensor = self._prefill(call, layout, own)
        parts["prefill"], parts["tensor"] = prefill, parts["tensor"] + tensor
        if layout.sharded:
            whole = Layout(tensor=layout.tensor, pipeline=layout.pipeline)
            numbers = self.memory.sizes.held(whole, _first(layout)).total
            span_of = layout.data * layout.tensor
            parts["gather"] = self.hardware.gather_seconds(numbers * self.role.width, layout.data, span_of)
        parts["batch"] = self._joining(call, layout)
        if self.hardware.machine.packs:
            parts["pack"] = 2 * self.memory.working(call, layout, _first(layout)).copies / self._rate
        return Cost(parts, late=1 - going.ended[int(0.9 * (len(going.ended) - 1))])

    def _decode_step(self, layout: Layout, live: float, cached: float) -> float:
        """One token for each live sequence, in the slowest stage: weights and cache are read."""
        config = self.role.config
        heads = max(1, config.num_kv_heads / layout.tensor)
        cache = 2 * cached * heads * config.head_dim * self.role.width / self._rate
        return max(
            layers * (self._layer(layout, live, cached / max(1.0, live)) + cache) + last * self._head(layout, live)
            for layers, last in self._stages(layout)
        )

    def _prefill(self, call: PlannedCall, layout: Layout, own: int) -> tuple[float, float]:
        """Prompts of this data rank, in passes of as many as fit: seconds of computing, and of tensor sums."""
        tokens = max(1.0, own / call.texts.per_prompt) * call.texts.prompt
        passes = max(layout.pipeline, ceil(tokens / PREFILL_TOKENS))
        rows, turns = tokens / passes, passes + layout.pipeline - 1
        layers = self._most_layers(layout)
        each = layers * self._layer(layout, rows, call.texts.prompt / 2) + self._pass_on(layout, rows)
        return turns * each, turns * (2 * layers + 1) * self._tensor_sum(layout, rows)


def _first(layout: Layout) -> Coordinates:
    return Coordinates(data=0, tensor=0, pipeline=0)
