"""Seconds of a model call in a layout: what is computed, what is read from memory, what is sent.

What products and messages take is `rates.py`'s to say; communication comes on top, since the runtime waits for it.
Counts follow `training/`, `generation/` and `parallel/` as they are. It knows nothing of meshes beyond how far a
layout's groups reach, or of other calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from meshift.layout.layout import Coordinates, Layout
from meshift.planner.decoding import course
from meshift.planner.hardware import Hardware
from meshift.planner.memory import FP32, PREFILL_TOKENS, Memory
from meshift.planner.rates import Adapters, rates_of
from meshift.planner.workload import PlannedCall, Role, Windows

BATCH_BYTES = 16
"""Of a token in a batch: its id and two or three floats."""
PROBE_TEXTS, PROBE_LENGTH = 2, 12
WORK = {"generate": "decode", "infer": "forward", "train": "backward"}
"""By what kind of work a call is hindered, or hinders others, where processes share processors."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a call by what they go to. `late` is the share of rows that end in a generation's last tenth.

    `busy` processes are at work, on average over the call: those that wait in a pipeline are not.
    """

    parts: Mapping[str, float] = field(default_factory=dict)
    late: float = 1.0
    busy: float = 1.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Stage:
    """Of a pipeline: its layers, those of them that learn and that have adapters, and whether the head is here."""

    layers: int
    learned: int
    adapted: int
    is_last: bool

    def forward(self, plain: float, adapted: float) -> float:
        """Seconds of a pass, by those of a layer without adapters and with them."""
        return (self.layers - self.adapted) * plain + self.adapted * adapted


class Costs:
    """Of one role's calls on one kind of device."""

    def __init__(self, role: Role, hardware: Hardware, memory: Memory | None = None) -> None:
        self.role, self.hardware = role, hardware
        self.memory = memory or Memory(role, hardware.machine)
        self.rates = rates_of(hardware, role.dtype, role.width)
        self._known_stages: dict[int, list[Stage]] = {}

    def of(self, call: PlannedCall, layout: Layout) -> Cost:
        """The whole call, all of its passes and updates, by its slowest rank; scaled as it was measured."""
        cost = self._modelled(call, layout)
        if call.factor == 1.0:
            return cost
        return replace(cost, parts={name: call.factor * seconds for name, seconds in cost.parts.items()})

    def _modelled(self, call: PlannedCall, layout: Layout) -> Cost:
        if call.kind == "generate":
            return self._generating(call, layout)
        return self._learning(call, layout) if call.kind == "train" else self._reading(call, layout)

    def _layer(self, kind: str, layout: Layout, rows: float, seen: float, *, plain: bool = False) -> float:
        """One layer's pass over rows that see `seen` tokens each, without communication.

        `plain`: one that has no adapters, though its role has some.
        """
        config = self.role.config
        attention = 4.0 * config.num_heads / layout.tensor * config.head_dim * rows * seen
        passing = rows * self.role.width * (8 * config.hidden_size + 4 * config.intermediate_size / layout.tensor)
        numbers = float(self.memory.sizes.layer(layout, _first(layout)))
        if plain or config.adapter is None or kind not in ("forward", "backward"):  # generation: by sums
            return self.rates.layer(kind, numbers, rows, attention, passing)
        rank, count = config.adapter.rank, len(config.adapter.targets)
        width = self.memory.sizes.layer_adapters(layout, _last(layout)) / rank
        matrices, own = ("forward", "beside") if kind == "forward" else ("frozen", "beside_back")
        seconds = self.rates.layer(matrices, numbers, rows, attention, passing)
        return seconds + self.rates.beside(own, Adapters(count=count, rank=rank, width=width), rows, numbers)

    def _forward(self, layout: Layout, rows: float, seen: float) -> tuple[float, float]:
        """Of a layer without adapters, and of one with them."""
        plain = self._layer("forward", layout, rows, seen, plain=True)
        return plain, plain if self.role.config.adapter is None else self._layer("forward", layout, rows, seen)

    def _head(self, kind: str, layout: Layout, rows: float) -> float:
        if self.role.head != "lm":
            return 0.0
        vocabulary = self.role.config.vocab_size / layout.tensor
        return self.rates.head(kind, vocabulary * self.role.config.hidden_size, rows, vocabulary)

    def _tensor_sum(self, layout: Layout, rows: float) -> float:
        """One all-reduce of rows over tensor ranks."""
        num_bytes, span = self._row_bytes(rows), self._tensor_span(layout)
        return self.hardware.sum_seconds(num_bytes, layout.tensor, span, layout.num_ranks, late=True)

    def _tensor_span(self, layout: Layout) -> int:
        """Neighbouring devices that tensor ranks are spread over: two hosts' where some groups cross hosts."""
        per_host = self.hardware.per_host
        crosses = layout.num_ranks > per_host and per_host % layout.tensor > 0
        return max(layout.tensor, per_host + 1) if crosses else layout.tensor

    def _row_bytes(self, rows: float) -> float:
        return rows * self.role.config.hidden_size * self.role.width

    def _pass_on(self, layout: Layout, rows: float) -> float:
        """Rows to the next stage, whose rank is as many devices away as a stage has."""
        if layout.pipeline == 1:
            return 0.0
        far = layout.num_ranks > self.hardware.per_host
        return self.hardware.send_seconds(self._row_bytes(rows), far=far)

    def _stages(self, layout: Layout) -> list[Stage]:
        """Of a pipeline, in order."""
        if layout.pipeline not in self._known_stages:
            every = layout.stage_layers(self.role.config.num_layers)
            config, frozen = self.role.config, self.role.num_frozen_layers
            first = config.num_layers if config.adapter is None else config.adapter.first_layer
            self._known_stages[layout.pipeline] = [
                Stage(len(one), _from(frozen, one), _from(first, one), number == len(every) - 1)
                for number, one in enumerate(every)
            ]
        return self._known_stages[layout.pipeline]

    def _most_layers(self, layout: Layout) -> int:
        return max(stage.layers for stage in self._stages(layout))

    def _passes(
        self, each: Sequence[float], num: int, layout: Layout, kind: str
    ) -> tuple[dict[str, float], float]:
        """Compute and bubbles of `num` passes through stages that take so long each; processes at work.

        The slowest stage works all the time but while the first pass comes to it and the last one leaves it.
        """
        longest, ahead = max(each), sum(each) - max(each)
        replicas = layout.data * layout.tensor
        busy = replicas * num * sum(each) / max(1e-30, num * longest + ahead)
        slow = self.rates.slow(kind, busy)
        return {"compute": slow * num * longest, "bubbles": slow * ahead}, busy

    def _joining(self, call: PlannedCall, layout: Layout) -> float:
        """Every rank is sent the batch by one process, and data ranks bring their rows of the outcome together."""
        num_bytes = BATCH_BYTES * call.texts.num_rows(share_prefixes=False)
        joined = self.hardware.gather_seconds(num_bytes, layout.data, layout.data * layout.tensor)
        if call.kind == "generate" or layout.num_ranks == 1:  # prompts are little
            return joined + self.rates.call
        rate, delay = self.hardware.rate_between(layout.num_ranks)
        return joined + layout.num_ranks * num_bytes / rate + delay + self.rates.call

    # Reading and learning

    def _reading(self, call: PlannedCall, layout: Layout) -> Cost:
        rows, num = self._rows(call, layout), self.memory.num_passes(call, layout)
        read, seen = self._read(call, rows), self._seen(call)
        layer, head = self._forward(layout, rows, seen), self._head("read", layout, read)
        each = [stage.forward(*layer) + stage.is_last * head for stage in self._stages(layout)]
        passes, busy = self._passes(each, num, layout, "forward")
        sums = (2 * self._most_layers(layout) + 1) * self._tensor_sum(layout, rows)
        turns = num + layout.pipeline - 1
        parts = {
            **passes,
            "tensor": turns * sums,
            "pipeline": turns * self._pass_on(layout, rows),
            "gather": self._gathers(layout, num, learning=False),
            "batch": self._joining(call, layout),
        }
        return Cost(parts, busy=busy)

    def _learning(self, call: PlannedCall, layout: Layout) -> Cost:
        rows, num = self._rows(call, layout), self.memory.num_passes(call, layout)
        read, seen = self._read(call, rows), self._seen(call)
        again, stages = self.role.passes.gradient_checkpointing, self._stages(layout)
        forward, back = self._forward(layout, rows, seen), self._layer("backward", layout, rows, seen)
        head = self._head("pass" if self._has_frozen_head else "learn", layout, read)
        each = [
            one.forward(*forward) + one.learned * (back + again * forward[-1]) + one.is_last * head
            for one in stages
        ]
        passes, busy = self._passes(each, num, layout, "backward")
        sums = max(2 * (one.layers + (1 + again) * one.learned) + 2 for one in stages)
        turns = num + layout.pipeline - 1
        sent = self._pass_on(layout, rows)
        learns_across = sum(one.learned > 0 for one in stages) > 1
        updates = call.num_updates * call.num_passes
        parts = {
            **passes,
            "tensor": turns * sums * self._tensor_sum(layout, rows),
            "pipeline": (1 + learns_across) * turns * sent,
            "gather": self._gathers(layout, num, learning=True),
            **self._updating(layout),
        }
        found = {name: updates * seconds for name, seconds in parts.items()}
        return Cost({**found, "batch": self._joining(call, layout)}, busy=busy)

    @property
    def _has_frozen_head(self) -> bool:
        """Whether the head is beside adapters, or the embedding, which is frozen with the lowest layers."""
        config = self.role.config
        return config.adapter is not None or (self.role.num_frozen_layers > 0 and config.tie_word_embeddings)

    def _updating(self, layout: Layout) -> dict[str, float]:
        """Gradients of data ranks added up, and the optimizer, where the most is trained."""
        ends = {0, layout.pipeline // 2, layout.pipeline - 1}
        places = (Coordinates(data=0, tensor=0, pipeline=stage) for stage in ends)
        trained = max(self.memory.sizes.held(layout, where).trained for where in places)
        slow, reduced = self.rates.slow("update", layout.num_ranks), 0.0
        if not layout.sharded and layout.data > 1:
            span = layout.data * layout.tensor
            copied = self.rates.over("copy", 2 * FP32 * trained) * slow
            reduced = self.hardware.sum_seconds(FP32 * trained, layout.data, span, layout.num_ranks) + copied
        update = self.rates.over("update", trained)
        update += self.rates.over("share", trained) * (self.hardware.processes > 1)
        return {"data": reduced, "update": slow * update}

    def _rows(self, call: PlannedCall, layout: Layout) -> float:
        """Of a mean micro-batch: all have nearly as many."""
        rows = call.texts.num_rows(share_prefixes=self.role.passes.share_prefixes)
        each = rows / (call.num_updates * layout.data)
        return max(1.0, each / self.memory.num_passes(call, layout))

    def _seen(self, call: PlannedCall) -> float:
        """Tokens that a row of the layers sees, itself included, in the mean."""
        shared = self.role.passes.share_prefixes
        return call.texts.num_pairs(self._windows, share_prefixes=shared) / call.texts.num_rows(
            share_prefixes=shared
        )

    @property
    def _windows(self) -> Windows:
        return self.role.config.windows or (None,)

    def _read(self, call: PlannedCall, rows: float) -> float:
        all_rows = call.texts.num_rows(share_prefixes=self.role.passes.share_prefixes)
        return rows * call.num_read * call.texts.num_sequences / max(1.0, all_rows)

    def _gathers(self, layout: Layout, num: int, *, learning: bool) -> float:
        """What `s` brings together and adds up: each layer in each pass, the rest once; in a pipeline all once.

        Backwards only the layers that learn are brought together again, and what is trained is added up.
        """
        if not layout.sharded or layout.data == 1:
            return 0.0
        sizes, stages, num_bytes = self.memory.sizes, self._stages(layout), self.role.width
        whole, turns = Layout(tensor=layout.tensor, pipeline=layout.pipeline), 1 if layout.pipeline > 1 else num
        plain, beside = sizes.layer(layout, _first(layout)), sizes.layer_adapters(layout, _last(layout))
        there = [sizes.held(whole, where) for where in _stage_places(whole)]

        def gather(numbers: float, width: int) -> float:
            return self.hardware.gather_seconds(numbers * width, layout.data, layout.data * layout.tensor)

        layer, adapted = gather(plain, num_bytes), gather(plain + beside, num_bytes)
        rest = max(0, there[0].total - stages[0].layers * plain - stages[0].adapted * beside)
        forward = turns * max(stage.forward(layer, adapted) for stage in stages) + gather(rest, num_bytes)
        if not learning:
            return forward
        learned, own = max(stage.learned for stage in stages), beside or plain
        backward = (layout.pipeline == 1) * turns * learned * adapted
        loose = max(held.trained - stage.learned * own for held, stage in zip(there, stages, strict=True))
        return forward + backward + turns * learned * gather(own, FP32) + gather(max(0, loose), FP32)

    # Generation

    def _generating(self, call: PlannedCall, layout: Layout) -> Cost:
        """As many sessions as stages take turns: each stage runs all of them once for every token."""
        own = max(1, ceil(call.texts.num_sequences / layout.data))
        sessions = min(layout.pipeline, own)
        slots = max(1, min(call.num_slots // sessions, ceil(own / sessions)))
        many, padded = layout.data * sessions, not self._reads_by_row
        going = course(call.texts, ceil(own / sessions), slots, many, self._windows, padded)
        parts = {"decode": 0.0, "tensor": 0.0, "pipeline": 0.0}
        work = busy = 0.0
        for span in going.spans:
            turns = span.steps * layout.pipeline
            each = self._decode_step(layout, span.live, span.cached)
            at_work = layout.data * layout.tensor * sum(each) / max(each)
            seconds = turns * max(each) * self.rates.slow("decode", at_work)
            work, busy = work + seconds, busy + seconds * at_work
            parts["decode"] += seconds
            parts["tensor"] += turns * self._decode_messages(layout, span.live)
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
            parts["pack"] = self.packing(layout)
        elif self.role.config.adapter is not None:
            parts["sums"] = self._sums(layout)
        late = 1 - going.ended[int(0.9 * (len(going.ended) - 1))]
        return Cost(parts, late=late, busy=busy / work if work else float(layout.num_ranks))

    @property
    def _reads_by_row(self) -> bool:
        """Whether decoding reads what each row's cache has: Meshift's kernels for CPUs do, and nothing else."""
        served = self.hardware.machine.kernels and self.role.dtype == "bfloat16"
        return served and self.role.config.attention_softcap is None

    def packing(self, layout: Layout) -> float:
        """Of the copy that a CPU multiplies by, made where weights are new."""
        if not self.hardware.machine.packs:
            return 0.0
        copied = self.memory.packed(layout, _first(layout))
        return self.rates.over("pack", copied) * self.rates.slow("pack", layout.num_ranks) + self._sums(layout)

    def _sums(self, layout: Layout) -> float:
        """Of putting adapters into the matrices beside them: those are read and written."""
        copied = self.memory.summed(layout, _last(layout))
        return self.rates.over("copy", 2 * copied) * self.rates.slow("pack", layout.num_ranks)

    def probe(self, home: Layout, target: Layout) -> float:
        """A few texts' log-probs where a role is trained, then by the generator (`runtime.probe`)."""
        rows, seconds = float(PROBE_TEXTS * PROBE_LENGTH), 2 * self.rates.call
        seconds += self._gathers(home, 1, learning=False)
        summed = (self._layer("prompt", target, rows, PROBE_LENGTH / 2),) * 2
        passes = (home, self._forward(home, rows, PROBE_LENGTH / 2), "read"), (target, summed, "draw")
        for layout, layer, head in passes:
            each = [
                one.forward(*layer) + one.is_last * self._head(head, layout, rows) for one in self._stages(layout)
            ]
            replicas = layout.data * layout.tensor
            seconds += sum(each) * self.rates.slow("forward", replicas)
            seconds += 2 * sum(one.layers for one in self._stages(layout)) * self._tensor_sum(layout, rows)
        return seconds

    def _decode_step(self, layout: Layout, live: float, cached: float) -> list[float]:
        """One token for each live sequence, in each stage: weights and cache are read; the last one draws."""
        config = self.role.config
        heads = max(1, config.num_kv_heads / layout.tensor)
        within, read = self.rates.cached(cached / max(1.0, live))
        cache = self.rates.over("cache", 2 * live * read * heads * config.head_dim * self.role.width)
        layer = self._layer("decode", layout, live, within) + cache
        head = self._head("draw", layout, live)
        return [stage.layers * layer + stage.is_last * head for stage in self._stages(layout)]

    def _decode_messages(self, layout: Layout, live: float) -> float:
        """Of tensor ranks: sums of rows, and logits that all are to have whole."""
        if layout.tensor == 1:
            return 0.0
        logits = FP32 * live * self.role.config.vocab_size
        sums = (2 * self._most_layers(layout) + 1) * self._tensor_sum(layout, live)
        span = self._tensor_span(layout)
        return sums + self.hardware.gather_seconds(logits, layout.tensor, span, among=layout.num_ranks)

    def _prefill(self, call: PlannedCall, layout: Layout, own: int) -> tuple[float, float]:
        """Prompts of this data rank, in passes of as many as fit: seconds of computing, and of tensor sums."""
        tokens = max(1.0, own / call.texts.per_prompt) * call.texts.prompt
        passes = max(layout.pipeline, ceil(tokens / PREFILL_TOKENS))
        rows, turns = tokens / passes, passes + layout.pipeline - 1
        layers = self._most_layers(layout)
        seen = call.texts.prompt_pairs(self._windows) / call.texts.prompt
        layer = self._layer("prompt", layout, rows, seen)
        slow = self.rates.slow("forward", layout.num_ranks * passes / turns)
        each = layers * slow * layer + self._pass_on(layout, rows)
        return turns * each, turns * (2 * layers + 1) * self._tensor_sum(layout, rows)


def _from(first: int, layers: range) -> int:
    """Layers of a stage from this one on."""
    return max(0, layers.stop - max(layers.start, first))


def _first(layout: Layout) -> Coordinates:
    return Coordinates(data=0, tensor=0, pipeline=0)


def _stage_places(layout: Layout) -> list[Coordinates]:
    return [Coordinates(data=0, tensor=0, pipeline=stage) for stage in range(layout.pipeline)]


def _last(layout: Layout) -> Coordinates:
    """Of the last stage, where adapters are if they are anywhere."""
    return Coordinates(data=0, tensor=0, pipeline=layout.pipeline - 1)
