"""Responses as reward models read them, and the divergence between two language models on completions.

It knows nothing of tasks' files or of estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from meshift.batch import Batch, Ragged
from meshift.data.chat import encode
from meshift.data.exchanges import Encoder
from meshift.data.pairs import Said
from meshift.data.rows import Row
from meshift.errors import DataError, ModelError, NonFiniteError
from meshift.evaluation.progress import Progress
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import Question
from meshift.models.hf.load import load_config
from meshift.models.rotary import longest_sequence
from meshift.runtime.models import check_reward_model, model_folder, open_tokenizer, stop_token_ids
from meshift.runtime.role import LocalRole, open_role
from meshift.training.readings import SequenceScores, TokenLogprobs

ROWS_AT_A_TIME = 64
MOST_NAMED, LONGEST_SHOWN = 3, 40


class ScoreReader:
    """How a reward or cost model reads texts: with its own tokenizer, as `meshift reward` trains on them. The
    response ends in an end token, unless the limit of tokens cut it off.

    With `chat` texts go through its chat template. One without a template reads texts as they are, since so it was
    trained; and messages by the template of the model that answered, `policy`, if that has the same tokens, as a
    reward model does in `meshift ppo`. Raises `ModelError` for what is no reward model.
    """

    def __init__(self, name: str, role: str, *, chat: bool, policy: str | None = None) -> None:
        check_reward_model(name, role)
        self.name, self.role, self._policy = name, role, policy
        tokenizer = open_tokenizer(name)
        self._is_bare = chat and not tokenizer.chat_template
        if self._is_bare:
            tokenizer.chat_template = _template_of(policy, tokenizer)
        stops = stop_token_ids(name, tokenizer)
        self._encoder = Encoder(tokenizer=tokenizer, apply_chat_template=chat, stop_token_ids=stops)
        self._plain = replace(self._encoder, apply_chat_template=False)
        self._longest = longest_sequence(load_config(model_folder(name)))

    def check(self, questions: Sequence[Question]) -> list[str]:
        """Raise for a question that it cannot read with any response; what should be known of how it reads."""
        for question in questions:
            self.tokens(question, ".", truncated=False)
        if not self._is_bare:
            return []
        has_messages = any(not isinstance(question.prompt, str) for question in questions)
        how = f"in the chat template of {self._policy}" if has_messages else "as texts, as it was trained"
        return [f"the {self.role} model {self.name} has no chat template; it reads the dialogues {how}"]

    def tokens(self, question: Question, said: Said, truncated: bool) -> list[int]:
        """Prompt and response. Raises `DataError` for those that are too long for the model, and `ModelError` for
        messages where it has no chat template, and none can be lent to it."""
        encoder, prompt = self._encoder, question.prompt
        if self._is_bare and isinstance(prompt, str) and isinstance(said, str):
            encoder, said = self._plain, _after(prompt, said)
        elif self._is_bare and not encoder.tokenizer.chat_template:
            raise ModelError(
                f"the {self.role} model {self.name} has no chat template, by which it would read the messages of "
                f"{question.where}; put chat_template into its tokenizer_config.json"
            )
        exchange = encoder.exchange(prompt, said, Row(values={}, where=question.where))
        cut = truncated and isinstance(said, str)
        end = encode(encoder.tokenizer, str(said)) if cut else encoder.response_tokens(exchange)
        tokens = encoder.prompt_tokens(exchange) + end
        if len(tokens) > self._longest:
            raise DataError(
                f"{question.where}: prompt and response have {len(tokens)} tokens, and {self.name} takes "
                f"{self._longest}; leave the row out, or lower --max-new-tokens"
            )
        return tokens


def _template_of(policy: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The policy's chat template, where its tokens are those of this tokenizer."""
    theirs = None if policy is None else open_tokenizer(policy)
    if theirs is None or theirs.get_vocab() != tokenizer.get_vocab():
        return None
    return str(theirs.chat_template) if theirs.chat_template else None


def _after(prompt: str, said: str) -> str:
    """A chat model's answer where it follows a text: with the blank that answers begin with in such texts."""
    return said if not prompt or prompt[-1].isspace() or said[:1].isspace() else f" {said}"


class ScoreModel:
    """A reward or cost model, which reads texts as `ScoreReader` says."""

    def __init__(self, reader: ScoreReader, dtype: torch.dtype, on_progress: Progress | None = None) -> None:
        self._what = f"responses read by the {reader.role} model"
        self._on_progress = on_progress
        self._reader = reader
        self._role = open_role(reader.role, reader.name, "reward", dtype)

    def scores(
        self, questions: Sequence[Question], said: Sequence[Said], truncated: Sequence[bool]
    ) -> list[float]:
        """One per response. Raises `DataError` for one that is too long for the model, and `NonFiniteError` where
        a score is no number: no mean could hold it, and no response compares with it."""
        rows = [self._reader.tokens(*one) for one in zip(questions, said, truncated, strict=True)]
        found: list[float] = []
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            batch = Batch({"tokens": Ragged.from_rows(rows[start : start + ROWS_AT_A_TIME], torch.int64)})
            scores = self._role.infer(SequenceScores(), batch).batch["scores"]
            found += [float(score) for score in scores.values]
            if self._on_progress is not None:
                self._on_progress(self._what, len(found), len(rows))
        places = [f"{question.where}: {_opening(text)}" for question, text in zip(questions, said, strict=True)]
        return _numbers(found, f"the score of the {self._reader.role} model {self._reader.name}", places)


def kl_to_reference(
    model: str,
    reference: str,
    saved: Sequence[Saved],
    *,
    temperature: float,
    dtype: torch.dtype,
    on_progress: Progress | None = None,
) -> list[float]:
    """Of each completion, drawn from `model`, log(p / p_reference) in nats, summed over its tokens: the mean is
    KL(model || reference) per completion. Both divide their logits by the temperature, as in training.

    Raises `DataError` where a completion has no token ids, and `NonFiniteError` where a sum is no number.
    """
    bare = next((one for one in saved if not one.completion_ids or not one.prompt_ids), None)
    if bare is not None:
        raise DataError(f"the completion {bare.sample} of {bare.id!r} has no token ids, which KL is read at")
    sums = []
    for name, role in ((model, "actor"), (reference, "reference")):
        opened, found = open_role(role, name, "lm", dtype), torch.empty(0, dtype=torch.float64)
        for start in range(0, len(saved), ROWS_AT_A_TIME):
            found = torch.cat([found, _logprobs(opened, saved[start : start + ROWS_AT_A_TIME], temperature)])
            if on_progress is not None:
                on_progress(f"completions read by the {role}", len(found), len(saved))
        sums.append(found)
    places = [f"{one.id}, sample {one.sample}" for one in saved]
    return _numbers((sums[0] - sums[1]).tolist(), f"KL of {model} to {reference}", places)


def _logprobs(role: LocalRole, saved: Sequence[Saved], temperature: float) -> torch.Tensor:
    """Of each completion's tokens the sum, float64 [completions]."""
    rows = [[*one.prompt_ids, *one.completion_ids] for one in saved]
    lengths = [len(one.completion_ids) for one in saved]
    batch = Batch(
        {
            "tokens": Ragged.from_rows(rows, torch.int64),
            "completion_lengths": Ragged.scalars(lengths, torch.int64),
        }
    )
    reading = TokenLogprobs(temperature=temperature)
    found = role.infer(reading, batch).batch[reading.key]
    return Ragged(found.values.double(), found.lengths).sum_rows()


def _numbers(values: list[float], what: str, places: Sequence[str]) -> list[float]:
    """The values, if all are finite. Raises `NonFiniteError` naming the first places of others."""
    wrong = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if not wrong:
        return values
    more = "; ..." if len(wrong) > MOST_NAMED else ""
    raise NonFiniteError(
        f"{what} is {values[wrong[0]]} for {len(wrong)} of {len(values)} responses "
        f"({'; '.join(places[i] for i in wrong[:MOST_NAMED])}{more}); check the weights, and try "
        "--dtype float32 where that is not what they are computed with"
    )


def _opening(said: Said) -> str:
    """Of a response the first words, to find it by."""
    text = said if isinstance(said, str) else str(said[-1].get("content", ""))
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}...")
