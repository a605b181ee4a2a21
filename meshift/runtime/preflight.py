"""Everything that can be found wrong with a config's files before a run: several problems at once.

It knows which keys name models, data and functions, and nothing of what a run does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from meshift.config.runs import RolloutRunConfig, RunConfig
from meshift.config.sections import RewardFunctionConfig, TrainableConfig
from meshift.data.dataset import dataset_rows
from meshift.errors import MeshiftError
from meshift.models.config import HeadKind
from meshift.models.hf.load import check_weights, load_config, open_weights
from meshift.planner.checking import most_slots
from meshift.rewards.configured import load_functions
from meshift.rewards.own import OWN
from meshift.runtime.machine import Memory
from meshift.runtime.memory import device_memory, held_bytes, held_models, memory_verdict, peak_verdict
from meshift.runtime.models import check_frozen_layers, model_folder, open_tokenizer
from meshift.runtime.observer import SilentObserver
from meshift.runtime.planned_run import expected_of, settled_config
from meshift.runtime.run_folder import check_output_dir
from meshift.runtime.spread_run import METHODS


def file_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the folders and files that a config names, whether or not its keys are right.

    `values` are as the YAML has them. One sentence each, which names the key.
    """
    problems = []
    for key, value in _leaves(values):
        leaf = key.rpartition(".")[2]
        if leaf in PROBES and isinstance(value, str):
            sentence = _sentence_of(partial(PROBES[leaf], value))
            if sentence is not None:
                problems.append(f"`{key}`: {sentence}")
    problems += _layer_problems(values)
    output_dir = values.get("output_dir")
    if isinstance(output_dir, str) and output_dir:
        overwrite = bool(values.get("overwrite_output_dir")) or bool(values.get("resume"))
        sentence = _sentence_of(lambda: check_output_dir(Path(output_dir), overwrite=overwrite))
        problems += [sentence] if sentence is not None else []
    return list(dict.fromkeys(problems))


def _layer_problems(values: Mapping[str, Any]) -> list[str]:
    """Sections that freeze more layers than their model has. A model that cannot be read is told elsewhere."""
    problems = []
    for key, section in values.items():
        if not isinstance(section, Mapping):
            continue
        name, frozen = section.get("model_name_or_path"), section.get("num_frozen_layers")
        if isinstance(name, str) and isinstance(frozen, int) and _sentence_of(partial(_probe_model, name)) is None:
            trained = TrainableConfig(num_frozen_layers=max(frozen, 0))
            problems.append(_sentence_of(partial(check_frozen_layers, key, name, trained)))
    return [problem for problem in problems if problem is not None]


def commands_of_rows(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods that the first row of a config's data is usually meant for; none where it tells nothing."""
    data = values.get("data")
    name = data.get("dataset_name") if isinstance(data, Mapping) else None
    if not isinstance(name, str):
        return ()
    try:
        columns = next(iter(dataset_rows(name))).values.keys()
    except MeshiftError:
        return ()
    for needed, methods in ROWS_OF.items():
        if set(needed) <= set(columns):
            return methods
    return ()


def weight_problems(config: RunConfig) -> list[str]:
    """What is wrong with the weights of each role's model, by the headers of its files."""
    held = held_models(config)
    sentences = [_sentence_of(partial(_check_weights, one.name, one.head)) for one in held]
    return list(dict.fromkeys(sentence for sentence in sentences if sentence is not None))


def memory_of(config: RunConfig) -> tuple[bool, str]:
    """Whether the run can fit into this machine's memory, and a sentence on it; by its plan, if it has one."""
    if config.plan.is_given and config.launch.launcher == "local":
        expected, memory = expected_of(config, METHODS[type(config)]), device_memory()
        fits, sentence = peak_verdict(expected.peaks, expected.worst.name, memory)
        slots = None if fits else _slots_that_fit(config, memory)
        return fits, sentence if slots is None else f"{sentence}; it would fit with num_slots={slots}"
    return memory_verdict(held_bytes(config, held_models(config)), device_memory())


def _slots_that_fit(config: RunConfig, memory: Memory) -> int | None:
    """The most completions that could be drawn at a time, if fewer were all that it takes."""
    if not isinstance(config, RolloutRunConfig):
        return None

    def fits(slots: int) -> bool:
        generation = config.generation.model_copy(update={"num_slots": slots})
        expected = expected_of(config.model_copy(update={"generation": generation}), METHODS[type(config)])
        return peak_verdict(expected.peaks, expected.worst.name, memory)[0]

    return most_slots(config.generation.num_slots, fits)


def as_it_would_run(config: RunConfig, tell: Callable[[str], None] = lambda text: None) -> RunConfig:
    """The config with the plan that `plan: auto` finds; `tell` hears of it. `ConfigError` where none fits."""
    return settled_config(config, METHODS[type(config)], _Told(tell))


class _Told(SilentObserver):
    """Passes messages on."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_message(self, text: str) -> None:
        """See `Observer`."""
        self._tell(text)


def dry_run(
    check: Callable[[Any], list[tuple[str, str]]], config: RunConfig
) -> tuple[list[tuple[str, str]], str | None]:
    """The rows of a dry run, or none and the problem that it ends with."""
    try:
        return check(config), None
    except MeshiftError as error:
        return [], str(error)


def _sentence_of(probe: Callable[[], object]) -> str | None:
    try:
        probe()
    except MeshiftError as error:
        return str(error)
    return None


def _check_weights(name: str, head: HeadKind) -> None:
    check_weights(model_folder(name), head)


def _probe_model(name: str) -> None:
    folder = model_folder(name)
    load_config(folder)
    open_weights(folder)
    open_tokenizer(name)


def _probe_rows(name: str) -> None:
    for _ in dataset_rows(name):  # a row that cannot be read is found when the reading gets there
        pass


def _probe_function(spec: str) -> None:
    if spec not in OWN:  # what these need stands in their kwargs, and is checked with the whole config
        load_functions([RewardFunctionConfig(function=spec)])


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no section and no list."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _leaves(value, f"{prefix}[{i}]")
    else:
        yield prefix, values


# From the most telling columns to the least; SFT reads pairs too, where its config says that it is SFT.
ROWS_OF: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("chosen", "rejected"): ("reward", "dpo"),
    ("completion", "label"): ("reward", "dpo", "kto"),
    ("messages",): ("sft",),
    ("completion",): ("sft",),
    ("text",): ("sft",),
}
PROBES: Mapping[str, Callable[[str], None]] = {
    "model_name_or_path": _probe_model,
    "dataset_name": _probe_rows,
    "eval_dataset_name": _probe_rows,
    "function": _probe_function,
}
