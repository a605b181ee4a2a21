"""Reward functions written in Python, with TRL's signature, several with weights.

`f(prompts, completions, completion_ids=..., **columns) -> list[float | None]`, plain or `async`; `None` means
that the function has nothing to say of a sample. It knows nothing of models or of training.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from meshift.batch import Batch, Outcome, Ragged
from meshift.config import RewardFunctionConfig
from meshift.errors import ConfigError, MeshiftError, RewardError

RewardFunction = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class WeightedFunction:
    """A function, its name in the metrics, and its share."""

    name: str
    function: RewardFunction
    weight: float


@dataclass(frozen=True, kw_only=True)
class RewardFunctions:
    """The host call `reward_functions`: texts and columns to one weighted score per row."""

    functions: Sequence[WeightedFunction]
    decode: Callable[[list[int]], str]
    columns: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Outcome:
        """Write `function_scores` [1] and the metrics `reward/<function>` (mean) of a rollout batch."""
        arguments = self._arguments(batch)
        total = torch.zeros(len(batch))
        metrics = {}
        for weighted in self.functions:
            scores = call_reward(weighted.function, weighted.name, arguments)
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
        columns = {name: list(batch.columns[name]) for name in self.columns}
        return {
            "prompts": columns.pop("prompt", prompts),
            "completions": [self.decode(ids) for ids in completions],
            "completion_ids": completions,
            **columns,
        }


def call_reward(function: RewardFunction, name: str, arguments: dict[str, Any]) -> torch.Tensor:
    """One function on one batch: fp32 [n], NaN where it returned None.

    Raises `RewardError`, naming the function and the sample, where it raises or returns anything but n numbers.
    """
    wanted = _accepted(function, arguments)
    try:
        result = function(**wanted)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait(result))
    except MeshiftError:
        raise
    except Exception as error:
        where = _line_of(error, function)
        raise RewardError(f"reward function {name} raised {type(error).__name__}: {error}{where}") from error
    return _checked(result, name, len(arguments["completions"]))


async def _wait(result: Any) -> Any:
    return await result


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
