"""The generation engine: continuous batching over a slot cache, by sessions of its own or of pipeline stages.

Knows nothing of prompts as text (a given `decode` serves stop strings alone), nor where the weights come
from.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from meshift.errors import ConfigError
from meshift.generation.cache import CacheBuffer, KVCache
from meshift.generation.fused import FusedDecoder
from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.generation.requests import check_requests, make_requests
from meshift.generation.session import Means, Session, bucket
from meshift.kernels.cpu import release_scratch
from meshift.layout.shard import share_out
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.decoder import Decoder
from meshift.parallel.pipeline import Stages

Progress = Callable[[int, int, Sequence[int]], None]
"""Called after each step with the number of finished sequences, the number of tokens generated so far, and the
tokens that each sequence has which grows on (with stages: of those that are drawn beside one another)."""
Finished = Callable[[list[Completion]], None]
"""Called after each step in which sequences ended, with their completions."""
Growth = Iterator[Completion]
"""A completion that has one token more each time it is given."""


class GenerationEngine:
    """Generates with the decoder's weights as they are when a call begins: updates between two calls need no word.

    A sequence's tokens depend on the seed, its own index and the weights only. Random numbers make this
    exact; the logits of a row are the same to 1e-5 (fp32, tested) whatever else is in the batch, so that a
    token could differ only where its random number lies that close to a boundary. In bf16 the same holds to
    bf16's precision.

    The key-value memory (at most `num_slots` sequences at a time) is kept between calls; `release` frees it. On a
    CPU so is a copy of the weights as its kernels read them, of `num_packed_bytes`; `release_weights` frees that.

    With `stages`, the model has a stage's layers, and all stages make the same calls and get the same completions.
    The requests are then as many sessions as there are stages: while one is drawn from in the last stage, the
    next runs in the stages before.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_slots: int = 64,
        decode: Decode | None = None,
        stages: Stages | None = None,
    ):
        if num_slots < 1:
            raise ConfigError(f"`num_slots` is {num_slots}; set it to at least 1.")
        if model.head_kind != "lm":
            raise ConfigError(f"A model with a {model.head_kind} head cannot generate; load it with head 'lm'.")
        self.model = model
        self.num_slots = num_slots
        self._decode = decode
        self._stages = stages
        self._buffers = [CacheBuffer() for _ in range(1 if stages is None else len(stages.peers))]
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
        for num_drawn, ended, session in self._steps(requests, params, seed):
            finished.update((completion.index, completion) for completion in ended)
            num_tokens += num_drawn
            if on_finished and ended:
                on_finished(ended)
            if on_progress:
                on_progress(len(finished), num_tokens, session.lengths)
        return [finished[request.index] for request in requests]

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], params: SamplingParams, *, seed: int, index: int = 0) -> Growth:
        """One prompt's completion as it grows, one token longer each time, whole at last.

        Its tokens are those that `generate` gives with this seed and index, and it raises what that raises.
        Whoever stops reading stops the generation.
        """
        requests = [Request(tokens=prompt, index=index)]
        check_requests(self.model, requests, params, self._decode)
        for _, ended, session in self._steps(requests, params, seed):
            yield ended[0] if ended else session.live.completion(0)

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Of every token but each sequence's first, by the products that completions are drawn with.

        At temperature 1, in fp32 whatever the weights are. With stages, all of them call it and get them.
        """
        self._decoder.refresh()
        lengths = [len(tokens) for tokens in sequences]
        tokens = torch.tensor([token for sequence in sequences for token in sequence], device=self.model.device)
        positions = packed_positions(lengths, self.model.device)
        entering = None if self._stages is None else self._stages.enter(len(tokens), self.model)
        hidden = self._decoder.forward(tokens, positions, PackedAttention(lengths), entering)
        if self._stages is not None and not self._stages.is_last:
            self._stages.pass_on(hidden)
            found = self._stages.hear(torch.empty(len(tokens) - len(lengths), dtype=torch.float64))
        else:
            last = torch.tensor(lengths).cumsum(0) - 1
            read = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, last, False).to(tokens.device)
            scores = self._decoder.logits(hidden).float().log_softmax(-1)[read]
            found = scores.gather(1, tokens.roll(-1)[read][:, None]).flatten().double().cpu()
            if self._stages is not None:
                self._stages.tell(found)
        if self._stages is not None:
            self._stages.finish()
        return found.tolist()

    def _steps(
        self, requests: Sequence[Request], params: SamplingParams, seed: int
    ) -> Iterator[tuple[int, list[Completion], Session]]:
        """Run until nothing lives or waits; gives for each step the tokens drawn, who ended, and whose it was."""
        self._decoder.refresh()
        sessions = deque(self._sessions(requests, params, seed))
        for _, session in sessions:
            session.begin()
        while sessions:
            buffer, session = sessions.popleft()
            num_drawn, ended = session.finish()
            yield num_drawn, ended, session
            if session.done:
                buffer.put(session.cache)
            else:
                session.begin()
                sessions.append((buffer, session))
        if self._stages is not None:
            self._stages.finish()

    def _sessions(
        self, requests: Sequence[Request], params: SamplingParams, seed: int
    ) -> Iterator[tuple[CacheBuffer, Session]]:
        """The requests in neighbouring parts, with the memory of each."""
        count = min(len(self._buffers), len(requests))
        for number, buffer in enumerate(self._buffers[:count]):
            start, stop = share_out(len(requests), number, count)
            part = requests[start:stop]
            num_slots = min(max(1, self.num_slots // count), len(part))
            cache = self._take_cache(buffer, part, num_slots, params)
            means = Means(decoder=self._decoder, cache=cache, stages=self._stages, decode=self._decode)
            yield buffer, Session(means, part, params, seed=seed, num_slots=num_slots)

    def _take_cache(
        self, buffer: CacheBuffer, requests: Sequence[Request], num_slots: int, params: SamplingParams
    ) -> KVCache:
        longest = max(len(request.tokens) for request in requests) + params.max_new_tokens
        return buffer.take(
            KVCache.shape(self.model, bucket(self._decoder, num_slots), longest),
            like=next(self.model.parameters()),
            first_layer=self.model.first_layer.attention.layer.index,
            for_kernels=self._decoder.takes_any_rows,
        )

    @property
    def num_kept_bytes(self) -> int:
        """Size of the key-value memory that is kept between calls."""
        return sum(buffer.num_bytes for buffer in self._buffers)

    @property
    def num_packed_bytes(self) -> int:
        """Size of the weights' copy that is kept between calls; 0 where generation reads the model's own."""
        return self._decoder.num_bytes

    def release(self) -> None:
        """Free all memory that is kept between calls."""
        self._buffers = [CacheBuffer() for _ in self._buffers]
        release_scratch()
        self.release_weights()

    def release_weights(self) -> None:
        """Free the copy of the weights, which the next call makes anew: for a model that is about to change."""
        self._decoder.release()
