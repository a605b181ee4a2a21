"""What is asked of a generation call, made and checked before it runs, and when a sequence ends.

Shared by the engine and its plain twin. Knows nothing of caches or scheduling.
"""

from collections.abc import Sequence

from meshift.errors import ConfigError, DataError
from meshift.generation.params import Completion, Decode, Request, SamplingParams
from meshift.models.decoder import Decoder


def conclude(completion: Completion, params: SamplingParams, *, matched: bool) -> bool:
    """Whether the last token ends the sequence, and if so why; `matched`: it completed a stop string."""
    num_tokens = len(completion.tokens)
    may_stop = num_tokens >= params.min_new_tokens
    if params.stop_token_ids:
        completion.num_stop_forbidden = min(params.min_new_tokens, num_tokens)
    if completion.tokens[-1] in params.stop_token_ids:
        completion.finish_reason = "stop_token"
    elif matched and may_stop:
        completion.finish_reason = "stop_string"
    elif num_tokens == params.max_new_tokens:
        completion.finish_reason, completion.truncated = "length", True
    else:
        return False
    return True


def make_requests(prompts: Sequence[Sequence[int]], *, num_generations: int, first_index: int) -> list[Request]:
    """One request for each completion, prompts-major, indices counted from `first_index`."""
    if num_generations < 1:
        raise ConfigError(f"`num_generations` is {num_generations}; set it to at least 1.")
    return [
        Request(tokens=tokens, index=first_index + i * num_generations + j)
        for i, tokens in enumerate(prompts)
        for j in range(num_generations)
    ]


def check_requests(
    model: Decoder, requests: Sequence[Request], params: SamplingParams, decode: Decode | None
) -> None:
    """Raise for everything about a call that this model cannot serve, before anything is run."""
    config = model.config
    if params.stop_strings and decode is None:
        raise ConfigError("`stop_strings` need a decoder of tokens; give the engine a tokenizer's `decode`.")
    stop_ids = params.stop_token_ids
    if max(stop_ids, default=0) >= config.vocab_size or len(set(stop_ids)) >= config.vocab_size:
        raise ConfigError(f"`stop_token_ids` {stop_ids} do not fit a vocabulary of {config.vocab_size} tokens.")
    if len({request.index for request in requests}) != len(requests):
        raise ConfigError("Two sequences have the same index; give each one its own.")
    room = config.max_positions - params.max_new_tokens
    for request in requests:
        _check_prompt(request, config.vocab_size, room)


def _check_prompt(request: Request, vocab_size: int, room: int) -> None:
    where = f"The prompt of sequence {request.index}"
    if not len(request.tokens):
        raise DataError(f"{where} is empty; give it at least one token (e.g. the bos token).")
    if len(request.tokens) > room:
        raise DataError(
            f"{where} has {len(request.tokens)} tokens, but the model's positions leave room "
            f"for {room} beside `max_new_tokens`; shorten the prompt or lower `max_new_tokens`."
        )
    if min(request.tokens) < 0 or max(request.tokens) >= vocab_size:
        raise DataError(f"{where} has a token id outside 0 to {vocab_size - 1}; check that the tokenizer fits.")
