"""The generation engine, in three verbs: schedule, run, postprocess. Continuous batching over a slot cache.

Knows nothing of prompts as text (a given `decode` serves stop strings alone), nor where the weights come
from.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from meshift.errors import ConfigError
from meshift.generation.cache import CacheBuffer, KVCache, StepAttention, round_up
from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.generation.requests import check_requests, conclude, make_requests
from meshift.generation.sampler import Draw, Sampler
from meshift.generation.scheduler import LiveSequence, Scheduler, Step
from meshift.generation.stop_strings import StopStringMatcher
from meshift.models.attention import packed_positions
from meshift.models.decoder import Decoder

ROW_STEP = 8
"""Every matrix product has a multiple of this many rows. Kernels differ in the last bit at odd row counts, so
this keeps a row's result from depending on its company, and the number of different shapes small."""
PREFILL_BUDGET = 4096
"""Prompt tokens in one forward pass; a longer prompt is the only one of its pass, beside the live rows."""

Progress = Callable[[int, int], None]
"""Called after each step with the number of finished sequences and the number of tokens generated so far."""
Growth = Iterator[Completion]
"""A completion that has one token more each time it is given."""


class GenerationEngine:
    """Generates with the decoder's own tensors: weights updated between two calls need no word here.

    A sequence's tokens depend on the seed, its own index and the weights only. Random numbers make this
    exact; the logits of a row are the same to 1e-5 (fp32, tested) whatever else is in the batch, so that a
    token could differ only where its random number lies that close to a boundary. In bf16 the same holds to
    bf16's precision.

    The key-value memory (at most `num_slots` sequences at a time) is kept between calls; `release` frees it.
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
    ) -> list[Completion]:
        """As `generate`, with every index given; neighbours with the same prompt share its prefill."""
        check_requests(self.model, requests, params, self._decode)
        if not requests:
            return []
        scheduler = Scheduler(requests, num_slots=self.num_slots, prefill_budget=PREFILL_BUDGET)
        num_tokens = 0
        for num_drawn in self._steps(scheduler, requests, params, seed):
            num_tokens += num_drawn
            if on_progress:
                on_progress(len(scheduler.finished), num_tokens)
        return [scheduler.finished[request.index] for request in requests]

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], params: SamplingParams, *, seed: int, index: int = 0) -> Growth:
        """One prompt's completion as it grows: the same object after each token, whole after the last.

        Its tokens are those that `generate` gives with this seed and index, and it raises what that raises.
        Whoever stops reading stops the generation.
        """
        requests = [Request(tokens=prompt, index=index)]
        check_requests(self.model, requests, params, self._decode)
        scheduler = Scheduler(requests, num_slots=1, prefill_budget=PREFILL_BUDGET)
        for _ in self._steps(scheduler, requests, params, seed):
            yield scheduler.finished[index] if scheduler.done else scheduler.live[0].completion

    def _steps(
        self, scheduler: Scheduler, requests: Sequence[Request], params: SamplingParams, seed: int
    ) -> Iterator[int]:
        """Run until nothing lives or waits; yields how many tokens each step has drawn."""
        sampler = Sampler(params, seed=seed)
        cache = self._take_cache(requests, params)
        while not scheduler.done:
            step = scheduler.schedule()
            draw = self._run(step, cache, sampler)
            self._postprocess(step, draw, params, scheduler, cache)
            yield len(draw.tokens)
        self._buffer.put(cache)

    @property
    def num_kept_bytes(self) -> int:
        """Size of the key-value memory that is kept between calls."""
        return self._buffer.num_bytes

    def release(self) -> None:
        """Free the key-value memory that is kept between calls."""
        self._buffer = CacheBuffer()

    def _take_cache(self, requests: Sequence[Request], params: SamplingParams) -> KVCache:
        longest = max(len(request.tokens) for request in requests) + params.max_new_tokens
        shape = KVCache.shape(self.model.config, min(self.num_slots, len(requests)), longest)
        return self._buffer.take(shape, like=self.model.embedding.weight)

    def _run(self, step: Step, cache: KVCache, sampler: Sampler) -> Draw:
        """One forward pass over the live rows and the entering prompts, then one token for each sequence."""
        attention = StepAttention(
            cache,
            [sequence.num_cached for sequence in step.live],
            [len(group.tokens) for group in step.prefill],
        )
        hidden = self._forward(step, attention)
        for group, prefix in zip(step.prefill, attention.prefixes(hidden), strict=True):
            group.prefix = prefix
        rows = torch.cat([hidden[: len(step.live)], *_enter(step, cache)])
        sequences = [sequence.completion for sequence in step.sequences]
        logits = self.model.head(_pad_rows(rows))[: len(rows)]
        return sampler.draw(logits, [c.index for c in sequences], [len(c.tokens) for c in sequences])

    def _forward(self, step: Step, attention: StepAttention) -> Tensor:
        """Hidden rows of the live sequences' newest tokens, then of the prompts; possibly none."""
        tokens = [sequence.completion.tokens[-1] for sequence in step.live]
        tokens += [token for group in step.prefill for token in group.tokens]
        device = self.model.embedding.weight.device
        positions = torch.cat(
            [
                torch.tensor([sequence.num_cached for sequence in step.live], dtype=torch.int64),
                packed_positions([len(group.tokens) for group in step.prefill]),
            ]
        )
        if not tokens:  # all that enter share a prompt that was run before
            return self.model.embedding.weight[:0]
        flat = torch.tensor(tokens, dtype=torch.int64)
        return self.model(_pad_rows(flat).to(device), _pad_rows(positions).to(device), attention)

    def _postprocess(
        self, step: Step, draw: Draw, params: SamplingParams, scheduler: Scheduler, cache: KVCache
    ) -> None:
        """Append the tokens, let the finished sequences leave, close the gaps they left in the cache."""
        finished = [self._append(sequence, draw, row, params) for row, sequence in enumerate(step.sequences)]
        for source, target, length in scheduler.leave(finished):
            cache.move(source, target, length)

    def _append(self, sequence: LiveSequence, draw: Draw, row: int, params: SamplingParams) -> bool:
        """Add the token drawn for a sequence; returns whether it was its last."""
        completion = sequence.completion
        completion.tokens.append(draw.tokens[row])
        completion.logprobs.append(draw.logprobs[row])
        if draw.support is not None:
            completion.support = completion.support or []
            completion.support.append(draw.support[row])
        if params.stop_strings and sequence.matcher is None and self._decode is not None:
            sequence.matcher = StopStringMatcher(params.stop_strings, self._decode)
        matched = sequence.matcher is not None and sequence.matcher.completed_by_last(completion.tokens)
        return conclude(completion, params, matched=matched)


def _enter(step: Step, cache: KVCache) -> list[Tensor]:
    """Copy prefixes into the slots of entering sequences; returns their last hidden rows by group."""
    slot = len(step.live)
    rows = []
    for group, sequences in step.entering:
        assert group.prefix is not None
        cache.fill(slot, slot + len(sequences), group.prefix)
        rows.append(group.prefix.hidden.expand(len(sequences), -1))
        slot += len(sequences)
    return rows


def _pad_rows(rows: Tensor) -> Tensor:
    """Zero rows at the end, up to a multiple of ROW_STEP."""
    missing = round_up(len(rows), ROW_STEP) - len(rows)
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, missing))
