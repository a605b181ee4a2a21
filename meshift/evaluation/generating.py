"""Completions of a task's questions by our engine.

It knows nothing of scores. Sample j of question i is drawn from the stream (seed, i * num_samples + j), so that
two models are compared on the same random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from meshift.data.chat import check_asks, encode
from meshift.data.exchanges import Encoder
from meshift.data.rows import Row
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import Question, Task, asked_messages, cut_at
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.runtime.models import open_model, open_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How completions are drawn; `params` without stops, which the model and the task have."""

    params: SamplingParams
    num_samples: int
    seed: int
    chat: bool
    dtype: torch.dtype


def generate(
    model: str,
    task: Task,
    questions: Sequence[Question],
    drawing: Drawing,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Saved]]:
    """`num_samples` completions of each question. Raises `DataError` for a prompt too long for the model."""
    tokenizer = open_tokenizer(model)
    encoder = Encoder(tokenizer=tokenizer, append_eos=False, apply_chat_template=drawing.chat)
    prompts = [prompt_tokens(question, encoder) for question in questions]
    decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    engine = GenerationEngine(open_model(model, "lm", drawing.dtype), decode=decode)
    strings = () if drawing.chat else task.stop_strings
    stops = stop_token_ids(model, tokenizer)
    params = dataclasses.replace(drawing.params, stop_token_ids=stops, stop_strings=strings)
    n = drawing.num_samples
    drawn = engine.generate(prompts, params, seed=drawing.seed, num_generations=n, on_progress=on_progress)
    return [
        [
            Saved(
                id=question.id,
                sample=j,
                completion=cut_at(completion_text(tokenizer, prompt, one.tokens), strings),
                truncated=one.truncated,
                prompt_ids=prompt,
                completion_ids=one.tokens,
            )
            for j, one in enumerate(drawn[i * n : (i + 1) * n])
        ]
        for i, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
    ]


def prompt_tokens(question: Question, encoder: Encoder) -> list[int]:
    """What the model reads: the plain prompt, or with a chat template what it is asked."""
    said = asked_messages(question) if encoder.apply_chat_template else question.prompt
    if isinstance(said, str) and not encoder.apply_chat_template:
        return encode(encoder.tokenizer, said, opening=True)
    conversation = encoder.asked(said, Row(values={"prompt": said}, where=question.where))
    check_asks(conversation.messages, "prompt", question.where)
    return encode(encoder.tokenizer, conversation.opening(encoder.tokenizer))


def completion_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: list[int]) -> str:
    """The completion as it continues its prompt: alone it would lose a leading space in some tokenizers."""
    whole = str(tokenizer.decode(prompt + tokens, skip_special_tokens=True))
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
