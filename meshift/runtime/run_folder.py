"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl and TensorBoard curves, on disk as soon as written.

It knows nothing of models or of what the metrics mean. A run that is killed loses at most the line it was writing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from meshift.config import Section, dump_config
from meshift.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG, METRICS, SAMPLES, CURVES = "config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard"
WRITTEN_BY_RUNS = (CONFIG, METRICS, SAMPLES, CURVES, "final", "final_critic")


class RunFolder:
    """Makes the folder when entered, and appends to its files until left.

    Raises `ConfigError` where the folder holds another run's metrics. With `overwrite` that run's files go, its
    final models too, so that what is found there later is of one run; files of other names stay.
    """

    def __init__(
        self, output_dir: Path, report_to: Sequence[str] = ("tensorboard",), *, overwrite: bool = False
    ) -> None:
        self.path = output_dir
        self._with_curves = "tensorboard" in report_to
        self._overwrite = overwrite
        self._metrics: IO[str] | None = None
        self._samples: IO[str] | None = None
        self._curves: SummaryWriter | None = None

    def __enter__(self) -> Self:
        check_output_dir(self.path, overwrite=self._overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _remove_old_run(self.path)
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
            self._samples = (self.path / SAMPLES).open("a", encoding="utf-8")
        except OSError as error:
            self.close()
            raise ConfigError(
                f"cannot write to `output_dir` {self.path} ({error.strerror}); use another"
            ) from None
        if self._with_curves:
            from torch.utils.tensorboard import SummaryWriter

            self._curves = SummaryWriter(log_dir=str(self.path / CURVES))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_config(self, config: Section) -> None:
        """Write the resolved config; whoever reads it sees all of it or nothing."""
        unfinished = self.path / f".{CONFIG}.new"
        unfinished.write_text(dump_config(config), encoding="utf-8")
        os.replace(unfinished, self.path / CONFIG)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics, with `training/global_step`. NaN and infinity become null."""
        values = {"training/global_step": step, **{key: _number(value) for key, value in metrics.items()}}
        _append(self._metrics, values)
        if self._curves is None:
            return
        for key, value in values.items():
            if value is not None:
                self._curves.add_scalar(key, value, step)
        self._curves.flush()

    def write_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows of JSON values, one object per line. NaN and infinity become null."""
        for row in rows:
            _append(self._samples, {key: _strict(value) for key, value in row.items()})

    def close(self) -> None:
        """Close every file. Called on leaving; a second call does nothing."""
        for file in (self._metrics, self._samples, self._curves):
            if file is not None:
                file.close()
        self._metrics = self._samples = self._curves = None


def check_output_dir(path: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` unless a new run may write here."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"`output_dir` {path} is a file; name a folder")
    if not overwrite and _holds_run(path):
        raise ConfigError(
            f"`output_dir` {path} holds the metrics of another run; name another folder, "
            "or set overwrite_output_dir=true to delete that run"
        )


def _holds_run(path: Path) -> bool:
    """Whether a run has finished a step here; one that failed before that leaves nothing worth keeping."""
    metrics = path / METRICS
    return metrics.is_file() and metrics.stat().st_size > 0


def _remove_old_run(path: Path) -> None:
    if not (path / METRICS).is_file():  # then what lies there is no run's, and not ours to delete
        return
    for name in WRITTEN_BY_RUNS:
        old = path / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


def _append(file: IO[str] | None, values: Mapping[str, Any]) -> None:
    if file is None:
        raise RuntimeError("a RunFolder is written to between entering and leaving it")
    file.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")
    file.flush()


def _number(value: float) -> float | None:
    # int() and float() also take in numpy's and torch's numbers, which json does not write.
    exact = value if isinstance(value, int) else float(value)
    return exact if math.isfinite(exact) else None


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
