"""Reward functions written in Python: of TRL's, verl's or OpenRLHF's signature, several with weights.

A step's texts and columns become one weighted score per sample; what goes wrong is named, or counted and
passed over. It knows nothing of models or of training.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from meshift.batch import WHERE, Batch, Outcome, Ragged, column_key
from meshift.errors import ConfigError, RewardError
from meshift.rewards import hanging
from meshift.rewards.answers import STOPPED, AnswerInvoker
from meshift.rewards.calling import EventLoopThread, Invoker
from meshift.rewards.locating import score_samples
from meshift.rewards.remote import RemoteReward
from meshift.rewards.samples import Samples
from meshift.rewards.scores import TIMEOUT, Scores
from meshift.rewards.signatures import RewardFunction, Signature, make_calls, read_signature, unknown_signature
from meshift.rewards.worker import ProcessInvoker, num_timeouts

logger = logging.getLogger(__name__)
STEP = "step"
BLOCKED = 1.1  # of the time that any call may take
"""The key of a batch whose rows are not all of a step's: the step, from 0, in every row."""


@dataclass(frozen=True, kw_only=True)
class WeightedFunction:
    """A function, its name in the metrics, its share, and what its config says; `spec` says where to load it.

    `plain` is a completion that does no harm, of a function whose time a completion may waste.
    """

    name: str
    function: RewardFunction
    weight: float
    spec: str | None = None
    timeout_s: float | None = None
    on_error: Literal["stop", "skip"] = "stop"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plain: str | None = None


class RewardFunctions:
    """The host call `reward_functions`: texts and columns to one weighted score per row.

    `columns` are the data's names; in the batch they stand under `column_key(name)`. The column `prompt`, where
    there is one, holds each row's prompt as the data gave it (a text or messages). `decode` leaves special tokens
    out, `decode_all` keeps them. A batch may tell `index` and `where`: the step, and names for samples.
    """

    def __init__(
        self,
        *,
        functions: Sequence[WeightedFunction],
        decode: Callable[[list[int]], str],
        columns: tuple[str, ...] = (),
        decode_all: Callable[[list[int]], str] | None = None,
        max_steps: int = 0,
    ) -> None:
        self.columns = columns
        self.decode = decode
        self.decode_all = decode_all or decode
        self.max_steps = max_steps
        loop = EventLoopThread()
        self._callers = [_Caller(weighted, loop) for weighted in functions]
        self._warned: set[str] = set()
        self._warned_of_none = False

    def __call__(self, batch: Batch) -> Outcome:
        """Write `function_scores` [1], NaN for a row that no function gave a number.

        Metrics: `reward/<function>` (the mean) and what it logs, as `reward/<function>/...`; its seconds, as
        `perf/time_per_reward/<function>`.

        Raises `RewardError` naming function and sample, where one fails whose `on_error` is "stop".
        """
        samples = self._samples(batch)
        total = torch.full((len(batch),), math.nan)
        metrics: dict[str, float] = {}
        for caller, (scores, seconds) in zip(self._callers, self._scores(samples), strict=True):
            self._report(caller.weighted, scores, samples)
            values = torch.tensor([math.nan if v is None else v for v in scores.values], dtype=torch.float32)
            added = torch.where(total.isnan(), 0.0, total) + caller.weighted.weight * values
            total = torch.where(values.isnan(), total, added)
            metrics |= _metrics(caller.weighted, scores)
            metrics[f"perf/time_per_reward/{caller.weighted.name}"] = seconds
        if total.isnan().all() and not self._warned_of_none:
            self._warned_of_none = True
            logger.warning(
                f"no reward function gave any of the {len(batch)} completions of step {samples.step + 1} a number"
            )
        return Outcome(batch=Batch({"function_scores": Ragged.scalars(total)}), metrics=metrics)

    def _scores(self, samples: Samples) -> list[tuple[Scores, float]]:
        """Every function's scores and seconds. Those that wait for others do so at the same time, beside the
        plain ones.

        Plain ones run one after another in this thread, outside of any event loop: they may use signals, or start
        a loop themselves.
        """
        waiting = {c: _Waiting(c, samples) for c in self._callers if c.waits}
        for thread in waiting.values():
            thread.start()
        return [waiting[c].scores() if c in waiting else c.score(samples) for c in self._callers]

    def _report(self, weighted: WeightedFunction, scores: Scores, samples: Samples) -> None:
        """Stop at a fault, or say the first one of a function once; so too where a sample was excused."""
        if not scores.faults and not scores.excused:
            return
        sentence = _sentence(weighted, scores, samples)
        if scores.faults and weighted.on_error == "stop":
            raise RewardError(sentence)
        if weighted.name not in self._warned:
            self._warned.add(weighted.name)
            logger.warning(sentence)

    def _samples(self, batch: Batch) -> Samples:
        lengths = batch["completion_lengths"].values.tolist()
        rows = [row.tolist() for row in batch["tokens"].rows()]
        prompt_ids = [row[: len(row) - length] for row, length in zip(rows, lengths, strict=True)]
        completion_ids = [row[len(row) - length :] for row, length in zip(rows, lengths, strict=True)]
        columns = {name: list(batch.columns[column_key(name)]) for name in self.columns}
        prompts = columns.pop("prompt", None) or [self.decode(ids) for ids in prompt_ids]
        texts = [self.decode(ids) for ids in completion_ids]
        prompt_texts = [self.decode_all(ids) for ids in prompt_ids]
        step = _step_of(batch)
        return Samples(
            prompts=prompts,
            completions=[_as_prompted(text, prompt) for text, prompt in zip(texts, prompts, strict=True)],
            completion_ids=completion_ids,
            texts=texts,
            prompt_texts=prompt_texts,
            queries=[
                self._query(row, prompt, n) for row, prompt, n in zip(rows, prompt_texts, lengths, strict=True)
            ],
            columns=columns,
            where=list(batch.columns.get(WHERE, [""] * len(batch))),
            step=step,
            max_steps=self.max_steps,
        )

    def _query(self, row: list[int], prompt: str, length: int) -> str:
        """Prompt and completion as one text that begins with the prompt: functions cut it off by its length."""
        text = self.decode_all(row)
        return text if text.startswith(prompt) else prompt + self.decode_all(row[len(row) - length :])


def _step_of(batch: Batch) -> int:
    """Given where rows are not all of a step's, else from the sequence numbers, which count through the run."""
    if STEP in batch:
        return int(batch[STEP].values[0])
    return int(batch["index"].values.min()) // len(batch) if "index" in batch else 0


def _as_prompted(text: str, prompt: Any) -> Any:
    """A completion in the shape of its prompt, as TRL gives it: a text, or a conversation of one message."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


class _Caller:
    """One function with the way it is called: in this process, or with a time limit in one of its own."""

    def __init__(self, weighted: WeightedFunction, loop: EventLoopThread) -> None:
        self.weighted = weighted
        signature = read_signature(weighted.function)
        if signature is None:
            raise ConfigError(unknown_signature(weighted.name))
        self.signature: Signature = signature
        self.invoke: Invoker | ProcessInvoker
        if weighted.timeout_s is None or isinstance(weighted.function, RemoteReward):
            self.invoke = Invoker(function=weighted.function, signature=signature, loop=loop)
        elif weighted.spec is None:
            raise ConfigError(
                f"reward function {weighted.name} has a timeout_s; name it by file or module for that"
            )
        elif weighted.plain is not None:
            self.invoke = AnswerInvoker(weighted.spec, signature, weighted.timeout_s, weighted.plain)
        else:
            self.invoke = ProcessInvoker(weighted.spec, signature, weighted.timeout_s)
        self.waits = signature.is_async or isinstance(weighted.function, RemoteReward)
        self.waits = self.waits or isinstance(self.invoke, ProcessInvoker)
        self.waits = self.waits or getattr(weighted.function, "waits", False)

    def score(self, samples: Samples) -> tuple[Scores, float]:
        """Scores and faults of the samples, and the seconds that it took."""
        started = time.perf_counter()
        slow = nullcontext() if isinstance(self.invoke, ProcessInvoker) else hanging.said_if_slow(*self._named)
        with slow:
            scores = score_samples(self._call, samples, first_only=self._first_only)
        return scores, time.perf_counter() - started

    @property
    def _named(self) -> tuple[str, RewardFunction]:
        return self.weighted.name, self.weighted.function

    @property
    def _first_only(self) -> bool:
        return self.weighted.on_error == "stop"

    def _call(self, samples: Samples) -> Scores:
        calls = make_calls(self.signature, samples, self.weighted.kwargs)
        return self.invoke(calls, len(samples), first_only=self._first_only)


class _Waiting(threading.Thread):
    """A caller at work in a thread that does not keep the program from ending."""

    def __init__(self, caller: _Caller, samples: Samples) -> None:
        super().__init__(daemon=True, name=f"reward {caller.weighted.name}")
        self._caller = caller
        self._samples = samples
        self._pulse: list[float] = caller.invoke.pulse if isinstance(caller.invoke, Invoker) else []
        self._pulse.clear()  # of the step before
        self._scores: tuple[Scores, float] | None = None
        self._error: RewardError | None = None

    def run(self) -> None:
        """Score the samples."""
        try:
            self._scores = self._caller.score(self._samples)
        except RewardError as error:
            self._error = error

    def scores(self) -> tuple[Scores, float]:
        """Wait for the scores and seconds. Raises the `RewardError` that the call ended with, or one for a
        coroutine that blocks the loop: not even its time limit comes to be looked at."""
        while self.is_alive():
            self.join(1.0)
            beats = self._pulse[:1]
            if beats and time.monotonic() - beats[0] > BLOCKED * hanging.ENDED_AFTER_S and self.is_alive():
                raise RewardError(
                    f"reward function {self._caller.weighted.name} keeps the event loop from going on; await what "
                    "takes long, or set its timeout_s"
                )
        if self._error is not None:
            raise self._error
        if self._scores is None:
            raise RuntimeError(f"the thread of reward function {self._caller.weighted.name} failed")
        return self._scores


def scores_of(weighted: WeightedFunction, samples: Samples) -> Scores:
    """What one function says of samples that no run drew: values and faults, which nobody has acted on."""
    return _Caller(weighted, EventLoopThread()).score(samples)[0]


def _metrics(weighted: WeightedFunction, scores: Scores) -> dict[str, float]:
    name = f"reward/{weighted.name}"
    metrics = {f"{name}/{key}": _mean(numbers) for key, numbers in scores.extras.items() if numbers}
    given = [value for value in scores.values if value is not None]
    if given:
        metrics[name] = _mean(given)
    if weighted.on_error == "skip":
        timeouts = num_timeouts(scores.faults)
        metrics[f"{name}/num_timeouts"] = timeouts
        metrics[f"{name}/num_errors"] = len(scores.faults) - timeouts
    return metrics


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _sentence(weighted: WeightedFunction, scores: Scores, samples: Samples) -> str:
    """What went wrong first, on which sample, and what to do."""
    if not scores.faults:
        index, fault = min(scores.excused.items())
        advice = f"answers like that are wrong ones, and reward/{weighted.name}/{STOPPED} is their part"
        return f"reward function {weighted.name} {fault.what} on {samples.name(index)}; {advice}"
    index, fault = min(scores.faults.items())
    place = f"a batch of {len(samples)} samples" if scores.of_batch else samples.name(index)
    if weighted.on_error == "skip":
        advice = f"samples like that get no reward from it, and reward/{weighted.name}/num_... counts them"
    elif fault.kind == TIMEOUT:
        advice = "raise its timeout_s (or set one), or set its on_error: skip"
    else:
        advice = "correct it, or set its on_error: skip"
    return f"reward function {weighted.name} {fault.what} on {place}; {advice}"
