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

from meshift.config.loading import dump_config
from meshift.config.section import Section
from meshift.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG, METRICS, SAMPLES, CURVES = "config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard"
MODELS = ("final", "final_critic")
WRITTEN_BY_RUNS = (CONFIG, METRICS, SAMPLES, CURVES, *MODELS)
# The first line of a config.yaml that a run wrote; one without it is the user's own.
CONFIG_HEADER = "# The resolved configuration of the run in this folder, written by meshift."
INPUT_KEYS = ("model_name_or_path", "dataset_name", "eval_dataset_name")


class RunFolder:
    """Makes the folder when entered, and appends to its files until left.

    Raises `ConfigError` where the folder holds another run. With `overwrite` that run's files go, its final
    models too, so that what is found there later is of one run; files of other names stay. Enter it when models
    and data are loaded: until then the old run is worth more than the new one.
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
            if (self.path / METRICS).is_file():  # else what lies there is no run's, and not ours to delete
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
        unfinished.write_text(f"{CONFIG_HEADER}\n{dump_config(config)}", encoding="utf-8")
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
    """Raise `ConfigError` unless a new run may write here, and would lose nothing of an old one by it."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"`output_dir` {path} is a file; name a folder")
    for name in MODELS:
        if (path / name).is_file():
            raise ConfigError(f"{path / name} is a file, where the run would put a model; move it away")
    found = None if overwrite else _worth_keeping(path)
    if found is not None:
        raise ConfigError(
            f"`output_dir` {path} holds {found}; name another folder, "
            "or set overwrite_output_dir=true to delete that run"
        )
    _check_writable(path)


def check_inputs_stay(config: Section, output_dir: Path, prefix: str = "") -> None:
    """Raise `ConfigError` where a model or data file that the config reads is one that the run would delete."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            check_inputs_stay(value, output_dir, f"{prefix}{name}.")
        elif name in INPUT_KEYS and value is not None:
            _check_stays(f"{prefix}{name}", Path(value), output_dir)


def _check_stays(key: str, path: Path, output_dir: Path) -> None:
    place = path.expanduser().resolve()
    for name in WRITTEN_BY_RUNS:
        if place.is_relative_to((output_dir / name).resolve()):
            raise ConfigError(
                f"`{key}` {path} lies in `output_dir` {output_dir}, where the run would delete it; "
                "name another output_dir, or move it"
            )


def _worth_keeping(path: Path) -> str | None:
    """What would be lost if a run wrote here. A run that ended before its first step leaves nothing such."""
    for name in (METRICS, SAMPLES):
        if (path / name).is_file() and (path / name).stat().st_size > 0:
            return f"the {name} of another run"
    for name in MODELS:
        if (path / name).exists():
            return f"a model in {name}/"
    if (path / CONFIG).exists() and not _written_by_run(path / CONFIG):
        return f"a {CONFIG} that no run wrote"
    return None


def _written_by_run(config: Path) -> bool:
    with config.open("rb") as file:
        return file.readline().strip() == CONFIG_HEADER.encode()


def _check_writable(path: Path) -> None:
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to `output_dir` {path} ({nearest} is no writable folder); use another")


def _remove_old_run(path: Path) -> None:
    for name in WRITTEN_BY_RUNS:
        old = path / name
        if old.is_dir() and not old.is_symlink():
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
