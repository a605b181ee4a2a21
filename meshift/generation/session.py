"""Some requests on their way through the engine, step by step: schedule, run, postprocess.

A step has two halves, so that a pipeline can work on several sessions in turn: `begin` runs the layers that are
here and passes the rows on (the last stage draws), `finish` learns what was drawn. Every stage keeps the same
books. It knows nothing of where the weights come from or of prompts as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from meshift.errors import NonFiniteError
from meshift.generation.cache import DecodeAttention, KVCache, PromptAttention, round_up
from meshift.generation.draws import hear_draw, tell_draw, tell_trouble
from meshift.generation.fused import FusedDecoder
from meshift.generation.live import LiveRows
from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.generation.sampler import Draw, Sampler
from meshift.generation.scheduler import Entry, Scheduler, Step
from meshift.models.attention import packed_positions
from meshift.parallel.pipeline import Stages

ROW_STEP = 8
"""Every matrix product has a multiple of this many rows. Kernels differ in the last bit at odd row counts, so
this keeps a row's result from depending on its company, and the number of different shapes small."""
PREFILL_BUDGET = 4096
"""Prompt tokens in one forward pass; a longer prompt is the only one of its pass."""


def row_bucket(num_rows: int, *, few: bool) -> int:
    """The number of rows that a pass over `num_rows` is padded to: 8, 16, 24, ..., and with `few` also 1, 2, 4."""
    if few and num_rows < ROW_STEP:
        return 1 << max(0, num_rows - 1).bit_length()
    return round_up(num_rows, ROW_STEP)


def bucket(decoder: FusedDecoder, num_rows: int) -> int:
    """Rows to pad to; none are added where that changes no bit."""
    if decoder.takes_any_rows:
        return num_rows
    return row_bucket(num_rows, few=decoder.packs and decoder.model.dtype == torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a session runs with: the layers that are here, its memory, and the stages beside this one, if any."""

    decoder: FusedDecoder
    cache: KVCache
    stages: Stages | None = None
    decode: Decode | None = None


class Session:
    """Requests and how far they are. `cache` has room for `num_slots` sequences."""

    def __init__(
        self, means: Means, requests: Sequence[Request], params: SamplingParams, *, seed: int, num_slots: int
    ) -> None:
        self._decoder, self._stages, self.cache = means.decoder, means.stages, means.cache
        self._scheduler = Scheduler(requests, num_slots=num_slots, prefill_budget=PREFILL_BUDGET)
        self.live = LiveRows(num_slots, params, means.decode)
        self._sampler = Sampler(params, seed=seed)
        self._draws = means.stages is None or means.stages.is_last
        self._drawn: Draw | None = None

    @property
    def done(self) -> bool:
        """Whether nothing lives or waits."""
        return self._scheduler.done

    @property
    def lengths(self) -> list[int]:
        """The tokens that each living sequence has."""
        return [int(count) for count in self.live.num_tokens[: self._scheduler.num_live]]

    def begin(self) -> None:
        """Run a step's rows. Raises `NonFiniteError` for logits that are NaN or infinite."""
        rows = self._run(self._scheduler.schedule())
        if not self._draws:
            return
        hidden = torch.cat(rows) if len(rows) > 1 else rows[0]
        num_rows = len(hidden)
        try:
            logits = self._decoder.logits(_pad(hidden, bucket(self._decoder, num_rows)))[:num_rows]
            self._drawn = self._sampler.draw(logits, self.live.indices[:num_rows], self.live.num_tokens[:num_rows])
        except NonFiniteError as error:
            if self._stages is not None:
                tell_trouble(self._stages, error, num_rows, self._sampler.params)
            raise
        if self._stages is not None:
            tell_draw(self._stages, self._drawn)

    def finish(self) -> tuple[int, list[Completion]]:
        """Take in the step's tokens: how many there are, and the sequences that end with them."""
        draw = self._drawn
        if draw is None:
            assert self._stages is not None
            draw = hear_draw(self._stages, self._scheduler.num_live, self._sampler.params)
        self._drawn = None
        rows = self.live.append(draw)
        ended = [self.live.completion(row) for row in rows]
        live = self.live
        for source, target in self._scheduler.leave(rows):
            self.cache.move(source, target, int(live.prompt_lengths[source] + live.num_tokens[source]) - 1)
            live.move(source, target)
        return len(draw.tokens), ended

    def _run(self, step: Step) -> list[Tensor]:
        """The last hidden rows of every sequence, by slot. Decoding comes first: it writes to free slots."""
        rows = [self._decode_step(step.num_live)] if step.num_live else []
        if step.entering:
            rows += self._prefill(step)
            for entry in step.entering:
                for slot, request in enumerate(entry.requests, start=entry.slot):
                    self.live.enter(slot, request)
        return rows

    def _decode_step(self, num_live: int) -> Tensor:
        """Hidden rows [num_live, hidden] of the live sequences' newest tokens."""
        cache = self.cache
        tokens, positions = self.live.newest(num_live)
        shortest, longest = int(positions.min()), int(positions.max())
        cache.grow(longest + 1, num_live)
        num_rows, device = bucket(self._decoder, num_live), cache.keys.device
        # Padding stands where some live row does, so that a window leaves it something to see.
        places = _pad(torch.from_numpy(positions), num_rows, longest).to(device)
        attention = DecodeAttention(cache, places, shortest=shortest, longest=longest)
        flat = _pad(torch.from_numpy(tokens), num_rows).to(device)
        entering = self._enter(num_live, num_rows)
        return self._pass_on(self._decoder.forward(flat, places, attention, entering)[:num_live])

    def _prefill(self, step: Step) -> list[Tensor]:
        """Begin the entering sequences in their slots; their prompts' last hidden rows, by entry."""
        cache = self.cache
        cache.grow(max(len(entry.group.tokens) for entry in step.entering), step.num_live)
        prefill = step.prefill
        last = iter(self._run_prompts(prefill) if prefill else ())
        rows = []
        for entry in step.entering:
            group, length = entry.group, len(entry.group.tokens)
            if group.prefix is not None:
                cache.fill(entry.slot, entry.stop, group.prefix)
                hidden = group.prefix.hidden
            else:
                hidden = next(last)
                cache.spread(entry.slot, entry.stop, length)
                group.prefix = cache.prefix(entry.slot, length, hidden) if group.waiting else None
            rows.append(hidden.expand(len(entry.requests), -1))
        return rows

    def _run_prompts(self, entries: Sequence[Entry]) -> Tensor:
        """Run prompts, each into its entry's first slot; their last hidden rows."""
        lengths = [len(entry.group.tokens) for entry in entries]
        attention = PromptAttention(self.cache, lengths, [entry.slot for entry in entries])
        tokens = torch.tensor([token for entry in entries for token in entry.group.tokens], dtype=torch.int64)
        padded, device = round_up(len(tokens), ROW_STEP), self.cache.keys.device
        flat, positions = (_pad(rows, padded).to(device) for rows in (tokens, packed_positions(lengths)))
        entering = self._enter(len(tokens), padded)
        leaving = self._decoder.forward(flat, positions, attention, entering)
        return self._pass_on(leaving[: len(tokens)])[attention.last_rows]

    def _enter(self, num_rows: int, num_padded: int) -> Tensor | None:
        """Rows from the stage before, with zeros behind them; None where tokens enter."""
        entering = None if self._stages is None else self._stages.enter(num_rows, self._decoder.model)
        return None if entering is None else _pad(entering, num_padded)

    def _pass_on(self, rows: Tensor) -> Tensor:
        """The same rows, sent to the stage behind this one, if there is one."""
        if self._stages is not None and not self._stages.is_last:
            self._stages.pass_on(rows)
        return rows


def _pad(rows: Tensor, num_rows: int, value: int = 0) -> Tensor:
    """Rows of `value` at the end, up to `num_rows`."""
    missing = num_rows - len(rows)
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, missing), value=value) if missing else rows
