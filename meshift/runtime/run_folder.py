"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl and TensorBoard curves, on disk as soon as written.

It knows nothing of models or of what the metrics mean. A run that is killed loses at most the line it was writing.
One that is resumed drops the lines of the steps that it runs again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from meshift.config.loading import dump_config
from meshift.config.section import Section
from meshift.data.names import parse_name
from meshift.errors import ConfigError, SaveError
from meshift.runtime.checkpoints import LATEST, checkpoint_folders, kept
from meshift.runtime.durable import (
    folder_aside,
    put_in_place,
    remove_folder,
    remove_leftovers,
    sync_tree,
    write_bytes,
)
from meshift.runtime.wandb_curves import WandbCurves

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG, METRICS, SAMPLES, CURVES = "config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard"
PLACEMENTS, PLAN, HANG = "placements.json", "plan.json", "hang_report.txt"
FINAL = "final"
MODELS = (FINAL, "final_critic")
ENVIRONMENT, REPORT = "environment.json", "report.html"
WRITTEN_BY_RUNS = (CONFIG, METRICS, SAMPLES, CURVES, ENVIRONMENT, PLACEMENTS, PLAN, HANG, REPORT, LATEST, *MODELS)
STEP_KEYS = {METRICS: "training/global_step", SAMPLES: "step"}
# The first line of a config.yaml that a run wrote; one without it is the user's own.
CONFIG_HEADER = "# The resolved configuration of the run in this folder, written by meshift."
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INPUT_KEYS = ("model_name_or_path", "dataset_name", "eval_dataset_name")


class RunFolder:
    """Makes the folder when entered, and appends to its files until left.

    Raises `ConfigError` where the folder holds another run. With `overwrite` that run's files go, its final
    models too, so that what is found there later is of one run; files of other names stay. Enter it when models
    and data are loaded: until then the old run is worth more than the new one. A run that is resumed after
    `num_done` steps keeps what those wrote. Only one process at a time can be in a folder.
    """

    def __init__(
        self,
        output_dir: Path,
        report_to: Sequence[str] = ("tensorboard",),
        *,
        overwrite: bool = False,
        num_done: int = 0,
    ) -> None:
        self.path = output_dir
        self._num_done = num_done
        self._lock: int | None = None
        self._with_curves = "tensorboard" in report_to
        self._with_wandb = "wandb" in report_to
        self._wandb: WandbCurves | None = None
        self._overwrite = overwrite
        self._metrics: IO[str] | None = None
        self._samples: IO[str] | None = None
        self._curves: SummaryWriter | None = None

    def __enter__(self) -> Self:
        check_output_dir(self.path, overwrite=self._overwrite or self._num_done > 0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            remove_leftovers(self.path)
            if self._with_wandb:  # may refuse: while the old run is still there
                self._wandb = WandbCurves(self.path, resumed=self._num_done > 0)
            if self._num_done > 0:
                _go_back(self.path, self._num_done)
            elif (self.path / METRICS).is_file():  # else what lies there is no run's, and not ours to delete
                _remove_old_run(self.path)
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
            self._samples = (self.path / SAMPLES).open("a", encoding="utf-8")
            if self._with_curves:
                self._open_curves()
        except OSError as error:
            self.close()
            if error.errno in DISK_IS_FULL:
                raise _full(self.path, self.path, error) from error
            raise ConfigError(
                f"cannot write to `output_dir` {self.path} ({error.strerror}); use another"
            ) from None
        except ConfigError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # Whatever was being written, the curves' own thread included: a full disk is no defect.
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            raise _full(Path(str(error.filename or self.path)), self.path, error) from error

    def _open_curves(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = self._num_done + 1 if self._num_done > 0 else None
        self._curves = SummaryWriter(log_dir=str(self.path / CURVES), purge_step=purged)

    def write_config(self, config: Section) -> None:
        """Write the resolved config; whoever reads it sees all of it or nothing."""
        write_bytes(self.path / CONFIG, f"{CONFIG_HEADER}\n{dump_config(config)}".encode())

    def write_placements(self, placements: Mapping[str, Sequence[int]]) -> None:
        """Write in which processes each call runs; nothing where all run in this one."""
        if not placements:
            (self.path / PLACEMENTS).unlink(missing_ok=True)
            return
        write_bytes(
            self.path / PLACEMENTS, (json.dumps({k: list(v) for k, v in placements.items()}) + "\n").encode()
        )

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write the plan with what was predicted of it; of a resumed run what its search had found stays."""
        path = self.path / PLAN
        if self._num_done > 0 and path.is_file():
            with suppress(ValueError):
                before = json.loads(path.read_bytes())
                if before.get("plan") == plan.get("plan"):
                    plan = {**before, **plan}
        if plan:
            write_bytes(path, (json.dumps(_strict(plan)) + "\n").encode())

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics, with `training/global_step`. NaN and infinity become null."""
        values = {"training/global_step": step, **{key: _number(value) for key, value in metrics.items()}}
        self._append(self._metrics, values)
        if self._wandb is not None:
            self._wandb.add(step, values)
        if self._curves is None:
            return
        try:
            for key, value in values.items():
                if value is not None:
                    self._curves.add_scalar(key, value, step)
            self._curves.flush()
        except OSError as error:
            raise _full(self.path / CURVES, self.path, error) from error

    def write_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows of JSON values, one object per line. NaN and infinity become null."""
        for row in rows:
            self._append(self._samples, {key: _strict(value) for key, value in row.items()})

    def sync(self) -> None:
        """Wait until what was written is on the disk, so that no checkpoint is ahead of the metrics."""
        for file in (self._metrics, self._samples):
            if file is not None:
                os.fsync(file.fileno())

    def save_models(self, save: Callable[[Path], None]) -> Path:
        """Let `save` write `final` (and folders beside it) aside, then put them in place; returns `final`.

        `final` comes last: where it is, all is there, and the run is finished. Raises `SaveError`.
        """
        final = self.path / FINAL
        try:
            with folder_aside(final) as aside:
                save(aside / FINAL)
                sync_tree(aside)
                for saved in sorted(aside.iterdir(), key=lambda path: path.name == FINAL):
                    put_in_place(saved, self.path / saved.name)
        except (OSError, SaveError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__ or error
            raise _full(final, self.path, cause) from error
        return final

    def close(self) -> None:
        """Close every file. Called on leaving; a second call does nothing."""
        for file in (self._metrics, self._samples, self._curves):
            try:
                if file is not None:
                    file.close()
            except OSError:
                continue  # a line that could not be written has raised before, and cannot be written now either
        self._metrics = self._samples = self._curves = None
        if self._wandb is not None:
            self._wandb.close()
        self._wandb = None
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _append(self, file: IO[str] | None, values: Mapping[str, Any]) -> None:
        if file is None:
            raise RuntimeError("a RunFolder is written to between entering and leaving it")
        try:
            file.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise _full(Path(file.name), self.path, error) from error


def check_output_dir(path: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` unless a new run may write here, and would lose nothing of an old one by it."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"`output_dir` {path} is a file; name a folder")
    for name in MODELS:
        if (path / name).is_file():
            raise ConfigError(f"{path / name} is a file, where the run would put a model; move it away")
    found = None if overwrite else worth_keeping(path)
    if found is not None:
        raise ConfigError(
            f"`output_dir` {path} holds {found}; name another folder, go on with --resume, "
            "or set overwrite_output_dir=true to delete that run"
        )
    for name in MODELS:
        if (path / name).exists() and not written_by_run(path / CONFIG):
            raise ConfigError(
                f"`output_dir` {path} holds {name}/ without the {CONFIG} of a run that wrote it; move it away, or "
                "name another folder"
            )
    _check_writable(path)


def check_inputs_stay(config: Section, output_dir: Path, prefix: str = "") -> None:
    """Raise `ConfigError` where a model or data file that the config reads is one that the run would delete."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            check_inputs_stay(value, output_dir, f"{prefix}{name}.")
        elif name in INPUT_KEYS and value is not None:
            place = value if name == "model_name_or_path" else parse_name(value).source
            _check_stays(f"{prefix}{name}", Path(place), output_dir)


def _check_stays(key: str, path: Path, output_dir: Path) -> None:
    place = path.expanduser().resolve()
    for name in (*WRITTEN_BY_RUNS, *(checkpoint.name for checkpoint in checkpoint_folders(output_dir))):
        if place.is_relative_to((output_dir / name).resolve()):
            raise ConfigError(
                f"`{key}` {path} lies in `output_dir` {output_dir}, where the run would delete it; "
                "name another output_dir, or move it"
            )


def worth_keeping(path: Path) -> str | None:
    """What would be lost if a run wrote here. A run that ended before its first step leaves nothing such."""
    for name in (METRICS, SAMPLES):
        if (path / name).is_file() and (path / name).stat().st_size > 0:
            return f"the {name} of another run"
    for name in MODELS:
        if (path / name).exists():
            return f"a model in {name}/"
    for checkpoint in checkpoint_folders(path):
        return f"{checkpoint.name} of another run"
    if (path / CONFIG).exists() and not written_by_run(path / CONFIG):
        return f"a {CONFIG} that no run wrote"
    return None


def written_by_run(config: Path) -> bool:
    """Whether this is a config.yaml that a run wrote."""
    if not config.is_file():
        return False
    with config.open("rb") as file:
        return file.readline().strip() == CONFIG_HEADER.encode()


def _check_writable(path: Path) -> None:
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to `output_dir` {path} ({nearest} is no writable folder); use another")


def _remove_old_run(path: Path) -> None:
    """What says that there was a run goes last, so that a removal that is broken off can be repeated."""
    (path / LATEST).unlink(missing_ok=True)
    for old in (*checkpoint_folders(path), *(path / name for name in reversed(WRITTEN_BY_RUNS))):
        if old.is_dir() and not old.is_symlink():
            remove_folder(old)
        else:
            old.unlink(missing_ok=True)


def _full(path: Path, run: Path, error: BaseException) -> SaveError:
    reason = getattr(error, "strerror", None) or error
    return SaveError(f"{path} could not be written ({reason}); {kept(run)}")


def _lock(path: Path) -> int:
    """Hold the folder for this process. The lock goes with the process, however it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another process is running in `output_dir` {path}; wait for it, or end it") from None
    except OSError:
        return descriptor  # a file system without locks
    return descriptor


def _go_back(path: Path, num_done: int) -> None:
    """Drop the lines of later steps, a torn last line too, and models that a kill left half in place."""
    for name, key in STEP_KEYS.items():
        if (path / name).is_file():
            lines = (path / name).read_bytes().splitlines(keepends=True)
            write_bytes(path / name, b"".join(line for line in lines if _is_of(line, key, num_done)))
    for name in MODELS:
        if (path / name).is_dir():
            remove_folder(path / name)


def _is_of(line: bytes, key: str, num_done: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)[key] <= num_done
    except (ValueError, KeyError, TypeError):
        return False


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
