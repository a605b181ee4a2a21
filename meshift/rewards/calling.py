"""Calls a reward function in the process at hand, plain or async, and names what it raises.

It knows nothing of configs, nor of what is done about errors.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from meshift.errors import RewardError
from meshift.rewards import hanging
from meshift.rewards.scores import TIMEOUT, CallError, Fault, Scores, collect, numbers_of, read_score, read_scores
from meshift.rewards.signatures import RewardFunction, Signature

MAX_CONCURRENT = 64  # calls of one async per-sample function that wait at the same time
NUM_SHOWN = 300  # characters of an exception's text that an error quotes
Result = tuple[float | Fault | None, dict[str, list[float]]]


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a TRL function finds in `trainer_state`: the steps that are done, and those of the run."""

    global_step: int
    max_steps: int


class EventLoopThread:
    """One event loop for all async functions and the whole run: they may keep sessions and locks between steps."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result; several threads may wait for theirs at the same time."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), daemon=True, name="rewards").start()
                weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


@dataclass(frozen=True, kw_only=True)
class Invoker:
    """A function of any flavour, called on what `make_calls` made. `timeout_s` is for async functions only.

    `pulse` holds when a coroutine last came to its end: one that blocks the loop keeps all others from theirs.
    """

    function: RewardFunction
    signature: Signature
    loop: EventLoopThread
    timeout_s: float | None = None
    pulse: list[float] = field(default_factory=list)

    def __call__(
        self, calls: Sequence[Mapping[str, Any]], num_samples: int, *, first_only: bool = False
    ) -> Scores:
        """Scores and faults of every sample, or with `first_only` up to the first fault.

        Raises `CallError` where a call on the whole batch gave nothing that can be read.
        """
        if not self.signature.per_sample:
            return self._batch(calls[0], num_samples)
        if self.signature.is_async:
            return collect(self.loop.run(self._concurrently(calls)))
        results: list[Result] = []
        for call in calls:
            results.append(self._one(call))
            if first_only and isinstance(results[-1][0], Fault):
                break
        return collect(results + [(None, {})] * (num_samples - len(results)))

    def _batch(self, call: Mapping[str, Any], num_samples: int) -> Scores:
        logs = _Logs()
        given = self._given(call, logs)
        result = self.loop.run(self._awaited(given)) if self.signature.is_async else self._plain(given)
        scores = read_scores(result, num_samples, self.signature.flavour)
        return Scores(values=scores.values, faults=scores.faults, extras=scores.extras | logs.numbers)

    def _plain(self, given: Mapping[str, Any]) -> Any:
        try:
            with hanging.ended_if_hung(self.function), named_errors(self.function):
                result = self.function(**given)
                if inspect.isawaitable(result):
                    return self.loop.run(_until(result, self.timeout_s))
                return list(result) if isinstance(result, Iterator) else result
        except hanging.HungError as hung:
            raise CallError(timed_out(None, hung.place)) from None

    async def _awaited(self, given: Mapping[str, Any]) -> Any:
        self.pulse[:] = [time.monotonic()]
        with named_errors(self.function):
            result = await _until(self.function(**given), self.timeout_s)
        self.pulse[:] = [time.monotonic()]
        return result

    def _one(self, call: Mapping[str, Any]) -> Result:
        try:
            return read_score(self._plain(call), self.signature.flavour)
        except CallError as failure:
            return failure.fault, {}

    async def _concurrently(self, calls: Sequence[Mapping[str, Any]]) -> list[Result]:
        room = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(call: Mapping[str, Any]) -> Result:
            async with room:
                try:
                    return read_score(await self._awaited(call), self.signature.flavour)
                except CallError as failure:
                    return failure.fault, {}

        return list(await asyncio.gather(*map(one, calls)))

    def _given(self, call: Mapping[str, Any], logs: _Logs) -> dict[str, Any]:
        """The arguments with what cannot travel through a pipe: a state, and functions."""
        if self.signature.flavour != "TRL":
            return dict(call)
        here: dict[str, Any] = {"log_extra": logs.extra, "log_metric": logs.metric}
        if "trainer_state" in call:
            here["trainer_state"] = TrainerState(**call["trainer_state"])
        return {**call, **{name: value for name, value in here.items() if self.signature.takes(name)}}


@dataclass(frozen=True)
class _Logs:
    """Takes what a TRL function logs. Texts are not kept."""

    numbers: dict[str, list[float]] = field(default_factory=dict)

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """TRL's `log_extra`: a value per sample."""
        self.metric(column, values)

    def metric(self, name: str, value: Any) -> None:
        """TRL's `log_metric`: a number."""
        self.numbers.setdefault(str(name), []).extend(numbers_of(value))


async def _until(awaitable: Awaitable[Any], timeout_s: float | None) -> Any:
    limit = asyncio.timeout(hanging.ENDED_AFTER_S if timeout_s is None else timeout_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():  # else the function's own
            raise CallError(timed_out(timeout_s)) from None
        raise


def timed_out(timeout_s: float | None, place: str = "") -> Fault:
    """The fault of a call that took too long; without a timeout_s, longer than any call may."""
    limit = f"{hanging.ENDED_AFTER_S:g} s" if timeout_s is None else f"timeout_s = {timeout_s:g}"
    return Fault(f"gave no answer within {limit}{place}", TIMEOUT)


@contextmanager
def named_errors(function: RewardFunction) -> Iterator[None]:
    """Turn whatever the function raises into a `CallError` with its line.

    A `RewardError` is Meshift's own: what should have scored is broken, and no sample is to blame.
    """
    try:
        yield
    except (CallError, RewardError):
        raise
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        text = " ".join(str(error).split())
        text = text if len(text) <= NUM_SHOWN else text[:NUM_SHOWN] + "..."
        raise CallError(Fault(f"raised {kind}: {text}{_line_of(error, function)}", kind)) from error


def _line_of(error: BaseException, function: RewardFunction) -> str:
    """The last line in the function's own file, not in a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    last = (own or frames)[-1:]
    return f" ({last[0].filename}, line {last[0].lineno})" if last else ""
