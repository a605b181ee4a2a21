"""A trainer of `transformers` or TRL, one optimizer step (PPO: one rollout) at a time, with the time of its parts.

Its `train()` runs in a thread of its own and stands still between rounds.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from benchmarks.serve import Reply, settle


class Stopwatch:
    """Seconds spent in wrapped functions, by name; what runs inside another is counted for itself only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Time `owner.attribute`, where there is one."""
        if hasattr(owner, attribute):
            setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - started
                self.seconds[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return run


class Gate(TrainerCallback):
    """Lets a trainer through one step at a time."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: str | None = None
        self.started = 0.0
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first round."""
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is made: say so, and wait for the next round."""
        settle()
        self.seconds = time.perf_counter() - self.started
        self._done.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        self.started = time.perf_counter()

    def run(self, train: Callable[[], Any]) -> None:
        """Train in a thread; where that fails, the waiting round is told."""

        def work() -> None:
            try:
                train()
                self.failure = "the trainer has ended"
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
                traceback.print_exc()
                raise
            finally:
                self._done.release()

        threading.Thread(target=work, daemon=True).start()

    def step(self) -> float:
        """Let one step through; its seconds. Raises `RuntimeError` where the trainer failed."""
        self._go.release()
        self._done.acquire()
        if self.failure:
            raise RuntimeError(self.failure)
        return self.seconds


class Stepwise:
    """Rounds of one step. A subclass makes the trainer in `start` and calls `begin`."""

    def begin(self, trainer: Any, watch: Stopwatch, counts: Counter[str]) -> None:
        """Start the trainer's thread, which waits before its first step."""
        self.gate, self.watch, self.counts = Gate(), watch, counts
        trainer.add_callback(self.gate)
        watch.wrap(trainer.accelerator, "backward", "backward")
        self.gate.run(trainer.train)

    def round(self, *, number: int) -> Reply:
        """One step: its seconds, the split by part, and the tokens that were trained on."""
        del number
        before, counted = defaultdict(float, self.watch.seconds), self.counts["tokens"]
        seconds = self.gate.step()
        calls = {name: round(s - before[name], 4) for name, s in self.watch.seconds.items()}
        return {"seconds": seconds, "num_tokens": self.counts["tokens"] - counted, "calls": calls}
