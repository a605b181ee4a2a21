"""How fast one process runs a model's layers, its head, and passes over memory, by the engines' own code.

It knows nothing of other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.generation.cache import CacheBuffer, DecodeAttention, KVCache, PromptAttention
from meshift.generation.fused import FusedDecoder
from meshift.generation.params import SamplingParams
from meshift.generation.sampler import Sampler
from meshift.generation.session import bucket
from meshift.layout.layout import Coordinates, Layout
from meshift.models.adapters import add_adapter
from meshift.models.attention import packed_positions
from meshift.models.config import Adapter
from meshift.models.decoder import Decoder
from meshift.models.heads import LanguageModelHead
from meshift.models.shards import is_adapters
from meshift.parallel.data import Ranks
from meshift.parallel.groups import Peers, Place
from meshift.planner.profile import BESIDE, NEAR, Product
from meshift.realloc.fingerprint import fingerprint
from meshift.runtime.profiling.models import Effort, made, numbers_of_layer, timed
from meshift.training.micro_batch import MicroBatch
from meshift.training.optimizer import MasterAdamW
from meshift.training.readings import TokenLogprobs

TEXT, COMPLETION = 32, 24
"""Tokens of a text that is run, and of those the ones that are read."""
FAR = 512
"""Length of a cache: what it takes more than one of `NEAR` is what reading it takes."""
LEAST = 0.01
"""Of a pass, what adapters take at least: a difference of two clocks may be none."""
CONFIG = TrainableConfig()
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model to be measured, and how."""

    model: Decoder
    effort: Effort

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device

    def seconds(self, call: Call) -> float:
        """Of a call, in the middle."""
        return timed(call, self.device, self.effort)

    def micro_batch(self, rows: int, *, learning: bool = False) -> MicroBatch:
        """Texts of so many rows in all."""
        length = min(TEXT, rows)
        lengths = torch.full((max(1, rows // length),), length)
        ids = torch.arange(int(lengths.sum())) * 7919 % self.model.config.vocab_size
        read = [max(1, length * COMPLETION // TEXT)] * len(lengths)
        batch = Batch({"tokens": Ragged(ids, lengths), "completion_lengths": Ragged.scalars(read, torch.int64)})
        return MicroBatch.of(TokenLogprobs(with_entropy=learning), batch, CONFIG)

    def product(
        self, kind: str, numbers: float, rows: float, seconds: float, more: float = 0.0, rank: int = 0
    ) -> Product:
        """What was found."""
        return Product(
            kind=kind,
            dtype=str(self.model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            numbers=float(numbers),
            rows=float(rows),
            rate=(2.0 * numbers * rows + more) / max(seconds, 1e-9),
            rank=rank,
        )


def products(work: Work) -> Iterator[Product]:
    """All kinds (`planner.profile.PRODUCTS` and `BESIDE`), at the sizes of the effort."""
    for rows in work.effort.rows:
        yield from _passes(work, rows)
        yield from _head(work, rows)
    yield from _beside(work)
    with torch.inference_mode():
        decoder = FusedDecoder(work.model)
        decoder.refresh()
        for rows in work.effort.rows:
            yield _prompt(work, decoder, rows)
        for live in work.effort.live:
            yield from _decode(work, decoder, live)


def forward(work: Work, rows: int) -> Call:
    """A pass through the layers, without gradients."""
    one = work.micro_batch(rows)

    def run() -> Tensor:
        with torch.no_grad():
            return one.run(work.model, checkpoint=False)

    return run


def there_and_back(work: Work, rows: int) -> Call:
    """A pass with gradients of all layers, but none of the embedding: that is a table's, not a product's."""
    one = work.micro_batch(rows, learning=True)
    work.model.embedding.weight.requires_grad_(False)
    gradient = torch.randn_like(forward(work, rows)()) * 1e-3  # type: ignore[call-overload]

    def run() -> None:
        one.run(work.model, checkpoint=False).backward(gradient)

    return run


def _passes(work: Work, rows: int) -> Iterator[Product]:
    config, num_layers = work.model.config, len(work.model.layers)
    numbers = numbers_of_layer(work.model)
    attention = 4.0 * config.num_heads * config.head_dim * rows * min(TEXT, rows) / 2
    once, both = work.seconds(forward(work, rows)), work.seconds(there_and_back(work, rows))
    for parameter in work.model.parameters():
        parameter.grad = None
    yield work.product("forward", numbers, rows, once / num_layers, attention)
    back = max(both - once, 0.1 * both)
    yield work.product("backward", numbers, rows, back / num_layers, attention)


def _beside(work: Work) -> Iterator[Product]:
    """A layer whose matrices are frozen, gone back through; and what adapters beside all of them take more."""
    model = made(work.model.config, work.model.dtype, work.device)
    beside, config, num_layers = Work(model=model, effort=work.effort), model.config, len(model.layers)
    numbers = numbers_of_layer(model)
    # The least adapter, in the first layer alone, so that gradients come back to it.
    model.first_layer.adapt(Adapter(rank=1, alpha=1.0, targets=("attention.query",)))
    plain = {rows: _both_ways(beside, rows) for rows in work.effort.rows}
    for rows, (_, back) in plain.items():
        attention = 4.0 * config.num_heads * config.head_dim * rows * min(TEXT, rows) / 2
        yield beside.product("frozen", numbers, rows, back / num_layers, attention)
    for rank in work.effort.ranks:
        add_adapter(model, Adapter(rank=rank, alpha=1.0, targets=config.linear_names))
        own = numbers_of_layer(model) - numbers
        for rows, before in plain.items():
            for kind, with_them, without in zip(BESIDE[1:], _both_ways(beside, rows), before, strict=True):
                more = max(with_them - without, LEAST * without) / num_layers
                yield beside.product(kind, own, rows, more, rank=rank)


def _both_ways(work: Work, rows: int) -> tuple[float, float]:
    """Seconds forward and back, where nothing learns but adapters."""
    for name, parameter in work.model.named_parameters():
        parameter.requires_grad_(is_adapters(name))
    once, both = work.seconds(forward(work, rows)), work.seconds(there_and_back(work, rows))
    for parameter in work.model.parameters():
        parameter.grad = None
    return once, max(both - once, 0.1 * both)


def _head(work: Work, rows: int) -> Iterator[Product]:
    """Log-probs of the rows that are read, without gradients, with those of the rows, and with the matrix's."""
    model, weight = work.model, work.model.embedding.weight
    one, chunk = work.micro_batch(rows, learning=True), CONFIG.logits_chunk
    plain = work.micro_batch(rows)
    hidden = torch.randn(len(one.rows), model.config.hidden_size).to(weight)

    def read() -> None:
        with torch.no_grad():
            plain.read(model, hidden, chunk)

    def learn() -> None:
        entering = hidden.clone().requires_grad_()
        outputs = one.read(model, entering, chunk)
        torch.stack([found.values.float().sum() for found in outputs.values()]).sum().backward()

    head = model.head
    assert isinstance(head, LanguageModelHead)
    numbers = head.projection.numel()
    yield work.product("read", numbers, len(one.rows), work.seconds(read))
    for kind, learns in (("pass", False), ("learn", True)):
        head.projection.requires_grad_(learns)
        yield work.product(kind, numbers, len(one.rows), work.seconds(learn))
        head.projection.grad = None
    head.projection.requires_grad_(False)


def _cache(work: Work, decoder: FusedDecoder, slots: int, length: int) -> KVCache:
    shape = KVCache.shape(work.model, slots, length)
    like = next(work.model.parameters())
    return CacheBuffer().take(shape, like=like, for_kernels=decoder.takes_any_rows)


def _prompt(work: Work, decoder: FusedDecoder, rows: int) -> Product:
    length = min(TEXT, rows)
    lengths = [length] * max(1, rows // length)
    cache = _cache(work, decoder, len(lengths), length)
    tokens = torch.arange(sum(lengths)).to(work.device) * 7919 % work.model.config.vocab_size
    positions = packed_positions(lengths).to(work.device)

    def run() -> Tensor:
        return decoder.forward(tokens, positions, PromptAttention(cache, lengths, list(range(len(lengths)))))

    config = work.model.config
    attention = 4.0 * config.num_heads * config.head_dim * rows * length / 2
    seconds = work.seconds(run) / len(work.model.layers)
    return work.product("prompt", numbers_of_layer(work.model), rows, seconds, attention)


def decode_step(work: Work, decoder: FusedDecoder, live: int, length: int = NEAR) -> Call:
    """One token of each of so many sequences of this length, through the layers."""
    num_rows = bucket(decoder, live)
    cache = _cache(work, decoder, num_rows, length)
    cache.grow(length, 0)
    places = torch.full((num_rows,), length - 1).to(work.device)
    tokens = torch.arange(num_rows).to(work.device)

    def run() -> Tensor:
        attention = DecodeAttention(cache, places, shortest=length - 1, longest=length - 1)
        return decoder.forward(tokens, places, attention)

    return run


def _decode(work: Work, decoder: FusedDecoder, live: int) -> Iterator[Product]:
    config = work.model.config
    seconds = work.seconds(decode_step(work, decoder, live)) / len(work.model.layers)
    attention = 4.0 * config.num_heads * config.head_dim * live * NEAR
    yield work.product("decode", numbers_of_layer(work.model), live, seconds, attention)
    hidden = torch.randn(bucket(decoder, live), config.hidden_size).to(next(work.model.parameters()))
    sampler = Sampler(SamplingParams(max_new_tokens=FAR), seed=0)

    def draw() -> object:
        return sampler.draw(decoder.logits(hidden)[:live], np.arange(live), np.zeros(live, dtype=np.int64))

    numbers = config.vocab_size * config.hidden_size
    yield work.product("draw", numbers, live, work.seconds(draw))


def speeds(work: Work) -> dict[str, float]:
    """Of passes over memory (`planner.profile.SPEEDS`)."""
    model = work.model
    found = {"update": _updates(work, alone=True)}
    shared = _updates(work, alone=False)
    # What sharing an update takes more, as a speed: 1 / shared = 1 / alone + 1 / share.
    found["share"] = 1 / max(1 / shared - 1 / found["update"], 1e-3 / shared)
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    num_bytes = sum(tensor.nbytes for tensor in held.values())

    def check() -> None:
        for tensor in held.values():
            shape = tuple(tensor.shape)
            fingerprint(tensor, tuple((0, n) for n in shape), shape)

    found["check"] = num_bytes / work.seconds(check)
    source = torch.ones(1 << 24, device=work.device)
    target = torch.empty_like(source)
    found["copy"] = source.nbytes / work.seconds(lambda: target.copy_(source))
    with torch.inference_mode():
        found |= _generation_speeds(work)
    return found


def _generation_speeds(work: Work) -> dict[str, float]:
    decoder, model = FusedDecoder(work.model), work.model
    found = {}
    if decoder.packs:

        def pack() -> None:
            decoder.release()
            decoder.refresh()

        seconds = work.seconds(pack)
        found["pack"] = decoder.num_bytes / seconds
    decoder.refresh()
    live = work.effort.live[-1]
    near, far = (work.seconds(decode_step(work, decoder, live, length)) for length in (NEAR, FAR))
    heads = model.num_kv_heads * model.config.head_dim * len(model.layers)
    num_bytes = 2 * live * (FAR - NEAR) * heads * next(model.parameters()).element_size()
    return {**found, "cache": num_bytes / max(far - near, 1e-6)}


def _updates(work: Work, *, alone: bool) -> float:
    """Numbers a second of an optimizer's step; where ranks share it, with the norm that they agree on."""
    optimizer = MasterAdamW(work.model, CONFIG, None if alone else Ranks(work.model, _alone()))
    for master in optimizer.masters:
        master.grad = torch.full_like(master, 1e-4)
    numbers = sum(master.numel() for master in optimizer.masters)
    return numbers / work.seconds(lambda: optimizer.step(1e-9))


def _alone() -> Place:
    peers = Peers(ranks=(0,), index=0, group=None)
    return Place(
        layout=Layout(),
        coordinates=Coordinates(data=0, tensor=0, pipeline=0),
        tensor=peers,
        data=peers,
        pipeline=peers,
    )
