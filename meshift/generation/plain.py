"""The plain twin of the engine and its oracle: no cache, no batching, one full forward pass per token.

Shares the sampler with the engine (tested on its own) and nothing of the cache, the schedule or the stop
matcher.
"""

from collections.abc import Sequence

import torch

from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.generation.requests import check_requests, conclude, make_requests
from meshift.generation.sampler import Sampler
from meshift.models.attention import PlainAttention, packed_positions
from meshift.models.decoder import Decoder


@torch.inference_mode()
def generate_plain(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seed: int,
    num_generations: int = 1,
    first_index: int = 0,
    decode: Decode | None = None,
) -> list[Completion]:
    """What `GenerationEngine.generate` returns, one token after another; same errors."""
    requests = make_requests(prompts, num_generations=num_generations, first_index=first_index)
    check_requests(model, requests, params, decode)
    sampler = Sampler(params, seed=seed)
    return [_complete(model, request, params, sampler, decode) for request in requests]


def _complete(
    model: Decoder, request: Request, params: SamplingParams, sampler: Sampler, decode: Decode | None
) -> Completion:
    completion = Completion(index=request.index, support=[] if params.truncates else None)
    device = model.embedding.weight.device
    ended = False
    while not ended:
        tokens = torch.tensor([*request.tokens, *completion.tokens], dtype=torch.int64, device=device)
        hidden = model(tokens, packed_positions([len(tokens)], device), PlainAttention([len(tokens)]))
        draw = sampler.draw(model.head(hidden[-1:]), [request.index], [len(completion.tokens)])
        completion.tokens += draw.tokens
        completion.logprobs += draw.logprobs
        if completion.support is not None and draw.support is not None:
            completion.support += draw.support
        ended = conclude(completion, params, matched=_new_match(completion.tokens, params, decode))
    return completion


def _new_match(tokens: list[int], params: SamplingParams, decode: Decode | None) -> bool:
    """Whether some stop string occurs more often in the text than it did without the last token."""
    if decode is None:
        return False
    text, before = decode(tokens), decode(tokens[:-1])
    return any(_occurrences(text, string) > _occurrences(before, string) for string in params.stop_strings)


def _occurrences(text: str, string: str) -> int:
    """How often `string` starts somewhere in `text`, overlaps counted."""
    return sum(text.startswith(string, start) for start in range(len(text)))
