"""A run's folder as the report reads it: config, environment, metrics as series, samples.

It reads what is there and judges nothing. Of a run in progress, or one that was killed, it reads every whole line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshift.errors import ConfigError, InputError
from meshift.report.series import Series
from meshift.yaml_values import read_yaml

CONFIG, METRICS, SAMPLES, ENVIRONMENT = "config.yaml", "metrics.jsonl", "samples.jsonl", "environment.json"
PLACEMENTS, PLAN = "placements.json", "plan.json"
STEP = "training/global_step"
EMPTY = Series([], [])
ROLLOUT_METHODS = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "remax")
"""Sections of the methods that learn from sampled completions."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of samples.jsonl. `fixed`: its prompt is sampled again and again through the run."""

    step: int
    index: int
    prompt: str
    completion: str
    reward: float | None
    truncated: bool
    fixed: bool


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run. `num_unreadable` counts lines of its files that are no JSON objects, a torn last one among them.

    `placements` are the processes of each call, in a run by plan; `plan` is what was predicted of it.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Series]
    samples: Sequence[Sample]
    num_steps: int
    has_model: bool
    num_unreadable: int
    placements: Mapping[str, Sequence[int]] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> Series:
        """A metric; an empty series where the run has none."""
        return self.metrics.get(key, EMPTY)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or value.get(part) is None:
                return default
            value = value[part]
        return value

    def number(self, key: str, default: float = 0.0) -> float:
        """A number of the config; the default where it is absent or no number."""
        value = self.setting(key)
        return float(value) if isinstance(value, int | float) else default

    @property
    def method(self) -> str:
        """`ppo`, `dpo`, `reward`, `sft`, `grpo` ..., or nothing: from the config, else from what was measured."""
        for section in (*ROLLOUT_METHODS, "dpo", "sft"):
            if section in self.config:
                return section
        for metric, method in (
            ("actor/pg_loss", "ppo"),
            ("logps/chosen", "dpo"),
            ("rewards/margins", "reward"),
            ("mean_token_accuracy", "sft"),
        ):
            if metric in self.metrics:
                return method
        return ""

    @property
    def model(self) -> str:
        """The name of the model that the run started from."""
        keys = ("actor.model_name_or_path", "model.model_name_or_path", "model_name_or_path")
        return next((str(self.setting(key)) for key in keys if self.setting(key)), "")


def read_run(folder: Path) -> RunData:
    """Read a run. Raises `InputError` where the folder is none of a run."""
    if not (folder / METRICS).is_file():
        raise InputError(
            f"{folder} holds no {METRICS}, so it is no run's folder; name the output_dir of a run"
            if folder.is_dir()
            else f"there is no folder {folder}; name the output_dir of a run"
        )
    rows, torn = _read_lines(folder / METRICS)
    samples, torn_samples = _read_lines(folder / SAMPLES)
    metrics, num_steps = _series(rows)
    return RunData(
        path=folder,
        name=folder.resolve().name,
        config=_read_config(folder / CONFIG),
        environment=_read_object(folder / ENVIRONMENT),
        placements=_placements(_read_object(folder / PLACEMENTS)),
        plan=_read_object(folder / PLAN),
        metrics=metrics,
        samples=[_sample(row) for row in samples],
        num_steps=num_steps,
        has_model=(folder / "final").is_dir(),
        num_unreadable=torn + torn_samples,
    )


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many lines were none."""
    rows, unreadable = [], 0
    for line in _lines(path):
        row = _object(line)
        if row is None:
            unreadable += 1
        else:
            rows.append(row)
    return rows, unreadable


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if line.strip())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _series(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Series], int]:
    """One series per metric, and the last step. Of a step that was run again after a resume the last row counts.

    A metric that is absent from a step was not measured there; one that is null was not finite.
    """
    by_step: dict[int, Mapping[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        step = row.get(STEP, number)
        if isinstance(step, int) and 0 <= step < 2**53:
            by_step[step] = row
    points: dict[str, list[tuple[int, float | None]]] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            if key != STEP and (value is None or isinstance(value, int | float)):
                points.setdefault(str(key), []).append((step, _as_float(value)))
    return {key: Series(*zip(*found, strict=True)) for key, found in points.items()}, max(by_step, default=0)


def _as_float(value: float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def _sample(row: Mapping[str, Any]) -> Sample:
    step, index, reward = row.get("step"), row.get("index"), row.get("reward")
    return Sample(
        step=step if isinstance(step, int) else 0,
        index=index if isinstance(index, int) else 0,
        prompt=_text(row.get("prompt")),
        completion=_text(row.get("completion")),
        reward=_as_float(reward) if isinstance(reward, int | float) else None,
        truncated=bool(row.get("truncated")),
        fixed=bool(row.get("fixed")),
    )


def _text(value: Any) -> str:
    """A text as it is; messages one below the other."""
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in value)
    return "" if value is None else str(value)


def _read_config(path: Path) -> Mapping[str, Any]:
    """The resolved config; without it the report shows the rest."""
    try:
        return read_yaml(path)
    except ConfigError:
        return {}


def _read_object(path: Path) -> Mapping[str, Any]:
    lines = list(_lines(path))
    return _object("".join(lines)) or {}


def _placements(content: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    return {
        name: processes
        for name, processes in content.items()
        if isinstance(processes, list)
        and processes
        and all(isinstance(p, int) and 0 <= p < 10**4 for p in processes)
    }


def name_runs(runs: Sequence[RunData]) -> list[str]:
    """A name for each run that tells it from the others: of its path, the parts that differ."""
    parts = [run.path.resolve().parts for run in runs]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    names = [p[-1] for p in parts]
    if len(set(names)) < len(names):
        names = ["/".join(p[-2:]) for p in parts]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]
