"""Reward functions written in Python, with TRL's signature, several with weights.

`f(prompts, completions, completion_ids=..., **columns) -> list[float | None]`, plain or `async`; `None` means
that the function has nothing to say of a sample. Where the data's prompt is a list of messages, `prompts` holds
such lists and `completions` lists of one assistant message. It knows nothing of models or of training.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from meshift.batch import Batch, Outcome, Ragged, column_key
from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError, MeshiftError, RewardError

RewardFunction = Callable[..., Any]
RESERVED_ARGUMENTS = ("prompts", "completions", "completion_ids")
"""What every function is given: no column of the data can have one of these names."""


@dataclass(frozen=True, kw_only=True)
class WeightedFunction:
    """A function, its name in the metrics, and its share."""

    name: str
    function: RewardFunction
    weight: float


@dataclass(frozen=True, kw_only=True)
class RewardFunctions:
    """The host call `reward_functions`: texts and columns to one weighted score per row.

    `columns` are the data's names; in the batch they stand under `column_key(name)`. The column `prompt`, where
    there is one, holds each row's prompt as the data gave it (a text or messages).
    """

    functions: Sequence[WeightedFunction]
    decode: Callable[[list[int]], str]
    columns: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Outcome:
        """Write `function_scores` [1] and the metrics `reward/<function>` (mean) of a rollout batch."""
        arguments = self._arguments(batch)
        total = torch.zeros(len(batch))
        metrics = {}
        for weighted, scores in zip(self.functions, call_rewards(self.functions, arguments), strict=True):
            judged = ~scores.isnan()
            metrics[f"reward/{weighted.name}"] = float(scores[judged].mean()) if judged.any() else math.nan
            total += weighted.weight * scores.nan_to_num(0.0)
        return Outcome(batch=Batch({"function_scores": Ragged.scalars(total)}), metrics=metrics)

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        completions, prompts = [], []
        lengths = batch["completion_lengths"].values.tolist()
        for row, length in zip(batch["tokens"].rows(), lengths, strict=True):
            tokens = row.tolist()
            prompts.append(self.decode(tokens[: len(tokens) - length]))
            completions.append(tokens[len(tokens) - length :])
        columns = {name: list(batch.columns[column_key(name)]) for name in self.columns}
        prompts = columns.pop("prompt", prompts)
        texts = [self.decode(ids) for ids in completions]
        return {
            "prompts": prompts,
            "completions": [_as_prompted(text, prompt) for text, prompt in zip(texts, prompts, strict=True)],
            "completion_ids": completions,
            **columns,
        }


def _as_prompted(text: str, prompt: Any) -> Any:
    """A completion in the shape of its prompt, as TRL gives it: a text, or a conversation of one message."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def call_rewards(functions: Sequence[WeightedFunction], arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Every function on one batch: fp32 [n] each, NaN where it returned None. Async ones wait at the same time.

    Raises `RewardError`, naming the function and the sample, where one raises or returns anything but n numbers.
    """
    results: list[Any] = []
    try:
        # Plain functions run outside of any event loop of ours: they may start one themselves.
        for weighted in functions:
            with _named_errors(weighted):
                results.append(weighted.function(**_accepted(weighted.function, arguments)))
        finished = _finished(functions, results)
    finally:
        for result in results:
            if inspect.iscoroutine(result):
                result.close()  # of a failed batch; one that has ended does not mind
    num_samples = len(arguments["completions"])
    return [_checked(one, weighted.name, num_samples) for weighted, one in zip(functions, finished, strict=True)]


def _finished(functions: Sequence[WeightedFunction], results: list[Any]) -> list[Any]:
    """The results with the awaitable ones awaited, all in one event loop."""
    if not any(inspect.isawaitable(result) for result in results):
        return results
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_gather(functions, results))
    with ThreadPoolExecutor(max_workers=1) as pool:  # a notebook's loop runs in this thread already
        return pool.submit(lambda: asyncio.run(_gather(functions, results))).result()


async def _gather(functions: Sequence[WeightedFunction], results: list[Any]) -> list[Any]:
    pairs = zip(functions, results, strict=True)
    return list(await asyncio.gather(*(_wait(weighted, result) for weighted, result in pairs)))


async def _wait(weighted: WeightedFunction, result: Any) -> Any:
    with _named_errors(weighted):
        return await result if inspect.isawaitable(result) else result


@contextmanager
def _named_errors(weighted: WeightedFunction) -> Iterator[None]:
    """Turn whatever the function raises into a `RewardError` with its name and line."""
    try:
        yield
    except MeshiftError:
        raise
    except Exception as error:
        where = _line_of(error, weighted.function)
        raise RewardError(
            f"reward function {weighted.name} raised {type(error).__name__}: {error}{where}"
        ) from error


def _accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters}
    return {key: value for key, value in arguments.items() if key in names}


def _checked(result: Any, name: str, num_samples: int) -> torch.Tensor:
    try:
        raws = list(result)  # once: a generator can be walked only once
        values = [math.nan if value is None else float(value) for value in raws]
    except (TypeError, ValueError):
        raise RewardError(
            f"reward function {name} returned {type(result).__name__}; return a list of numbers (or None)"
        ) from None
    if len(values) != num_samples:
        raise RewardError(
            f"reward function {name} returned {len(values)} values for {num_samples} completions; return one each"
        )
    for index, (value, raw) in enumerate(zip(values, raws, strict=True)):
        if raw is not None and not math.isfinite(value):
            raise RewardError(f"reward function {name} returned {raw} for sample {index}; return a finite number")
    return torch.tensor(values, dtype=torch.float32)


def _line_of(error: BaseException, function: RewardFunction) -> str:
    """The last line in the function's own file, not in a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    last = (own or frames)[-1:]
    return f" ({last[0].filename}, line {last[0].lineno})" if last else ""


def load_functions(configs: Sequence[RewardFunctionConfig]) -> list[WeightedFunction]:
    """Import every configured function. Raises `ConfigError` naming the one that is not there."""
    loaded = []
    names = [config.function.rpartition(":")[2] for config in configs]
    for config, short in zip(configs, names, strict=True):
        function = load_function(config.function)
        name = short if names.count(short) == 1 else config.function
        loaded.append(WeightedFunction(name=name, function=function, weight=config.weight))
    return loaded


def load_function(spec: str) -> RewardFunction:
    """`path/to/file.py:name` or `package.module:name` to the function."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"cannot read the reward function {spec!r}; write it as file.py:name or module:name")
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{place} has no function {name!r} (reward.functions names {spec!r})")
    return function


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path} (reward.functions names {spec!r})")
    module_spec = importlib.util.spec_from_file_location(f"meshift_reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path} is not a Python file (reward.functions names {spec!r})")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    return _executed(lambda: module_spec.loader.exec_module(module) or module, path, spec)  # type: ignore[union-attr]


def _load_module(name: str, spec: str) -> ModuleType:
    return _executed(lambda: importlib.import_module(name), name, spec)


def _executed(load: Callable[[], ModuleType], place: object, spec: str) -> ModuleType:
    try:
        return load()
    except Exception as error:
        raise ConfigError(
            f"importing {place} failed with {type(error).__name__}: {error} (reward.functions names {spec!r})"
        ) from error
