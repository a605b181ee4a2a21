"""The generation engine, in three verbs: schedule, run, postprocess. Continuous batching over a slot cache.

Knows nothing of prompts as text (a given `decode` serves stop strings alone), nor where the weights come
from.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from meshift.errors import ConfigError
from meshift.generation.cache import CacheBuffer, DecodeAttention, KVCache, PromptAttention, round_up
from meshift.generation.fused import FusedDecoder
from meshift.generation.live import LiveRows
from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.generation.requests import check_requests, make_requests
from meshift.generation.sampler import Draw, Sampler
from meshift.generation.scheduler import Entry, Scheduler, Step
from meshift.kernels.cpu import release_scratch
from meshift.models.attention import packed_positions
from meshift.models.decoder import Decoder

ROW_STEP = 8
"""Every matrix product has a multiple of this many rows. Kernels differ in the last bit at odd row counts, so
this keeps a row's result from depending on its company, and the number of different shapes small."""
PREFILL_BUDGET = 4096
"""Prompt tokens in one forward pass; a longer prompt is the only one of its pass."""

Progress = Callable[[int, int], None]
"""Called after each step with the number of finished sequences and the number of tokens generated so far."""
Finished = Callable[[list[Completion]], None]
"""Called after each step in which sequences ended, with their completions."""
Growth = Iterator[Completion]
"""A completion that has one token more each time it is given."""


def row_bucket(num_rows: int, *, few: bool) -> int:
    """The number of rows that a pass over `num_rows` is padded to: 8, 16, 24, ..., and with `few` also 1, 2, 4."""
    if few and num_rows < ROW_STEP:
        return 1 << max(0, num_rows - 1).bit_length()
    return round_up(num_rows, ROW_STEP)


class GenerationEngine:
    """Generates with the decoder's weights as they are when a call begins: updates between two calls need no word.

    A sequence's tokens depend on the seed, its own index and the weights only. Random numbers make this
    exact; the logits of a row are the same to 1e-5 (fp32, tested) whatever else is in the batch, so that a
    token could differ only where its random number lies that close to a boundary. In bf16 the same holds to
    bf16's precision.

    The key-value memory (at most `num_slots` sequences at a time) is kept between calls; `release` frees it. On a
    CPU so is a copy of the weights as its kernels read them, of `num_packed_bytes`; `release_weights` frees that.
    """

    def __init__(self, model: Decoder, *, num_slots: int = 64, decode: Decode | None = None):
        if num_slots < 1:
            raise ConfigError(f"`num_slots` is {num_slots}; set it to at least 1.")
        if model.head_kind != "lm":
            raise ConfigError(f"A model with a {model.head_kind} head cannot generate; load it with head 'lm'.")
        self.model = model
        self.num_slots = num_slots
        self._decode = decode
        self._buffer = CacheBuffer()
        self._decoder = FusedDecoder(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seed: int,
        num_generations: int = 1,
        first_index: int = 0,
        on_progress: Progress | None = None,
    ) -> list[Completion]:
        """`num_generations` completions of each prompt (token ids), prompts-major.

        Completion i * num_generations + j is the j-th of prompt i; `first_index` plus that number is its
        index. Raises DataError for a prompt that is empty, too long or not of this vocabulary, ConfigError
        for parameters this model cannot serve, NonFiniteError for logits that are NaN or infinite.
        """
        requests = make_requests(prompts, num_generations=num_generations, first_index=first_index)
        return self.generate_requests(requests, params, seed=seed, on_progress=on_progress)

    @torch.inference_mode()
    def generate_requests(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        seed: int,
        on_progress: Progress | None = None,
        on_finished: Finished | None = None,
    ) -> list[Completion]:
        """As `generate`, with every index given; neighbours with the same prompt share its prefill.

        `on_finished` gets completions as they end, those of one step together.
        """
        check_requests(self.model, requests, params, self._decode)
        if not requests:
            return []
        finished: dict[int, Completion] = {}
        num_tokens = 0
        for num_drawn, ended, _ in self._steps(requests, params, seed):
            finished.update((completion.index, completion) for completion in ended)
            num_tokens += num_drawn
            if on_finished and ended:
                on_finished(ended)
            if on_progress:
                on_progress(len(finished), num_tokens)
        return [finished[request.index] for request in requests]

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], params: SamplingParams, *, seed: int, index: int = 0) -> Growth:
        """One prompt's completion as it grows, one token longer each time, whole at last.

        Its tokens are those that `generate` gives with this seed and index, and it raises what that raises.
        Whoever stops reading stops the generation.
        """
        requests = [Request(tokens=prompt, index=index)]
        check_requests(self.model, requests, params, self._decode)
        for _, ended, live in self._steps(requests, params, seed):
            yield ended[0] if ended else live.completion(0)

    def _steps(
        self, requests: Sequence[Request], params: SamplingParams, seed: int
    ) -> Iterator[tuple[int, list[Completion], LiveRows]]:
        """Run until nothing lives or waits; gives for each step the tokens drawn, who ended, and who lives."""
        self._decoder.refresh()
        num_slots = min(self.num_slots, len(requests))
        scheduler = Scheduler(requests, num_slots=num_slots, prefill_budget=PREFILL_BUDGET)
        live = LiveRows(num_slots, params, self._decode)
        sampler = Sampler(params, seed=seed)
        cache = self._take_cache(requests, params)
        while not scheduler.done:
            step = scheduler.schedule()
            draw = self._run(step, cache, live, sampler)
            yield len(draw.tokens), _postprocess(draw, live, scheduler, cache), live
        self._buffer.put(cache)

    @property
    def num_kept_bytes(self) -> int:
        """Size of the key-value memory that is kept between calls."""
        return self._buffer.num_bytes

    @property
    def num_packed_bytes(self) -> int:
        """Size of the weights' copy that is kept between calls; 0 where generation reads the model's own."""
        return self._decoder.num_bytes

    def release(self) -> None:
        """Free all memory that is kept between calls."""
        self._buffer = CacheBuffer()
        release_scratch()
        self.release_weights()

    def release_weights(self) -> None:
        """Free the copy of the weights, which the next call makes anew: for a model that is about to change."""
        self._decoder.release()

    def _take_cache(self, requests: Sequence[Request], params: SamplingParams) -> KVCache:
        longest = max(len(request.tokens) for request in requests) + params.max_new_tokens
        num_slots = self._bucket(min(self.num_slots, len(requests)))
        shape = KVCache.shape(self.model.config, num_slots, longest, self.model.num_kv_heads)
        for_kernels = self._decoder.takes_any_rows
        return self._buffer.take(shape, like=self.model.embedding.weight, for_kernels=for_kernels)

    def _bucket(self, num_rows: int) -> int:
        """Rows to pad to; none are added where that changes no bit."""
        if self._decoder.takes_any_rows:
            return num_rows
        return row_bucket(
            num_rows, few=self._decoder.packs and self.model.embedding.weight.dtype == torch.bfloat16
        )

    def _run(self, step: Step, cache: KVCache, live: LiveRows, sampler: Sampler) -> Draw:
        """One token for each live sequence and each that enters. Decoding comes first: it writes to free slots."""
        rows = [self._decode_step(step.num_live, cache, live)] if step.num_live else []
        if step.entering:
            rows += self._prefill(step, cache)
            for entry in step.entering:
                for slot, request in enumerate(entry.requests, start=entry.slot):
                    live.enter(slot, request)
        hidden = torch.cat(rows) if len(rows) > 1 else rows[0]
        num_rows = len(hidden)
        logits = self._decoder.logits(_pad(hidden, self._bucket(num_rows)))[:num_rows]
        return sampler.draw(logits, live.indices[:num_rows], live.num_tokens[:num_rows])

    def _decode_step(self, num_live: int, cache: KVCache, live: LiveRows) -> Tensor:
        """Hidden rows [num_live, hidden] of the live sequences' newest tokens."""
        tokens, positions = live.newest(num_live)
        shortest, longest = int(positions.min()), int(positions.max())
        cache.grow(longest + 1, num_live)
        num_rows, device = self._bucket(num_live), cache.keys.device
        # Padding stands where some live row does, so that a window leaves it something to see.
        places = _pad(torch.from_numpy(positions), num_rows, longest).to(device)
        attention = DecodeAttention(cache, places, shortest=shortest, longest=longest)
        return self._decoder.forward(_pad(torch.from_numpy(tokens), num_rows).to(device), places, attention)[
            :num_live
        ]

    def _prefill(self, step: Step, cache: KVCache) -> list[Tensor]:
        """Begin the entering sequences in their slots; their prompts' last hidden rows, by entry."""
        cache.grow(max(len(entry.group.tokens) for entry in step.entering), step.num_live)
        prefill = step.prefill
        last = iter(self._run_prompts(prefill, cache) if prefill else ())
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

    def _run_prompts(self, entries: Sequence[Entry], cache: KVCache) -> Tensor:
        """Run prompts, each into its entry's first slot; their last hidden rows."""
        lengths = [len(entry.group.tokens) for entry in entries]
        attention = PromptAttention(cache, lengths, [entry.slot for entry in entries])
        tokens = torch.tensor([token for entry in entries for token in entry.group.tokens], dtype=torch.int64)
        padded = round_up(len(tokens), ROW_STEP)
        device = cache.keys.device
        flat, positions = (_pad(rows, padded).to(device) for rows in (tokens, packed_positions(lengths)))
        return self._decoder.forward(flat, positions, attention)[attention.last_rows]


def _postprocess(draw: Draw, live: LiveRows, scheduler: Scheduler, cache: KVCache) -> list[Completion]:
    """Append the tokens, let the ended sequences leave, close the gaps they left; returns those that ended."""
    rows = live.append(draw)
    ended = [live.completion(row) for row in rows]
    for source, target in scheduler.leave(rows):
        cache.move(source, target, int(live.prompt_lengths[source] + live.num_tokens[source]) - 1)
        live.move(source, target)
    return ended


def _pad(rows: Tensor, num_rows: int, value: int = 0) -> Tensor:
    """Rows of `value` at the end, up to `num_rows`."""
    missing = num_rows - len(rows)
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, missing), value=value) if missing else rows
