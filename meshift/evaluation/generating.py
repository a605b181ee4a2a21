"""Completions of a task's questions by our engine.

It knows nothing of scores. Sample j of question i is drawn from the stream (seed, i * 2**32 + j): two models are
compared on the same random numbers, and more questions or samples may be drawn later.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meshift.data.chat import check_asks, encode
from meshift.data.exchanges import Encoder
from meshift.data.rows import Row
from meshift.evaluation.saved import Saved
from meshift.evaluation.steps_left import StepsLeft
from meshift.evaluation.tasks import Question, Task, asked_messages, cut_at
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import Completion, Request, SamplingParams
from meshift.runtime.models import model_folder, open_model, open_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDICES_PER_QUESTION = 2**32
WEIGHTS = ("*.safetensors", "*.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How completions are drawn; `params` without stops, which the model and the task have."""

    params: SamplingParams
    num_samples: int
    seed: int
    chat: bool
    dtype: torch.dtype


class Drawer:
    """A model that answers a task's questions. Its weights are loaded when the first completion is drawn."""

    def __init__(self, model: str, task: Task, drawing: Drawing) -> None:
        self._model = model
        self._drawing = drawing
        self._tokenizer = open_tokenizer(model)
        self._encoder = Encoder(tokenizer=self._tokenizer, append_eos=False, apply_chat_template=drawing.chat)
        self._params = dataclasses.replace(
            drawing.params,
            stop_token_ids=stop_token_ids(model, self._tokenizer),
            stop_strings=() if drawing.chat else task.stop_strings,
        )

    def settings(self) -> dict[str, Any]:
        """All that completions depend on besides their questions; of the weights, their files' sizes and times."""
        return {
            "model": self._model,
            **dataclasses.asdict(self._params),
            "seed": self._drawing.seed,
            "chat": self._drawing.chat,
            "dtype": str(self._drawing.dtype).removeprefix("torch."),
            "weights": weights_of(self._model),
        }

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """What the model reads of each question, in token ids."""
        return [prompt_tokens(question, self._encoder) for question in questions]

    def draw(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[tuple[int, int]],
        on_finished: Callable[[list[Saved]], None],
        on_step: Callable[[int, float], None] = lambda done, left: None,
    ) -> None:
        """The samples (question, sample) that are wanted, given as they are finished.

        After every step of decoding `on_step` hears how many are done, and how many are expected to be left.

        Raises `DataError` for a prompt that is too long for the model.
        """
        if not wanted:
            return

        def decode(ids: list[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

        engine = GenerationEngine(open_model(self._model, "lm", self._drawing.dtype), decode=decode)
        requests = [Request(tokens=prompts[i], index=i * INDICES_PER_QUESTION + j) for i, j in wanted]

        left = StepsLeft(
            num_requests=len(requests),
            num_slots=min(engine.num_slots, len(requests)),
            max_new_tokens=self._params.max_new_tokens,
        )
        steps = itertools.count(1)

        def finished(completions: list[Completion]) -> None:
            left.add([len(one.tokens) for one in completions])
            places = [divmod(one.index, INDICES_PER_QUESTION) for one in completions]
            on_finished(
                [
                    self._saved(questions[i], j, prompts[i], one)
                    for (i, j), one in zip(places, completions, strict=True)
                ]
            )

        engine.generate_requests(
            requests,
            self._params,
            seed=self._drawing.seed,
            on_finished=finished,
            on_progress=lambda num_finished, num_tokens, live: on_step(next(steps), left(live)),
        )

    def _saved(self, question: Question, sample: int, prompt: Sequence[int], one: Completion) -> Saved:
        said = completion_text(self._tokenizer, list(prompt), one.tokens)
        return Saved(
            id=question.id,
            sample=sample,
            completion=cut_at(said, self._params.stop_strings),
            truncated=one.truncated,
            prompt_ids=prompt,
            completion_ids=one.tokens,
        )


def weights_of(model: str) -> dict[str, list[int]]:
    """The size and time of each file of weights, by name: by these a model that was trained on is told apart."""
    folder = model_folder(model)
    return {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for pattern in WEIGHTS
        for path in sorted(folder.glob(pattern))
    }


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
