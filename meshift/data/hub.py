"""Datasets in the hands of the `datasets` library: folders that its save_to_disk wrote, and hub ids.

The library is part of the extra `data`, and imported here only. It knows no columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from meshift.data.parquet import INSTALL
from meshift.errors import DataError

DEFAULT_SPLIT = "train"
WRITTEN_BY_DATASETS = ("state.json", "dataset_dict.json")


def folder_values(path: Path, split: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote. Raises DataError."""
    if not any((path / name).is_file() for name in WRITTEN_BY_DATASETS):
        raise DataError(
            f"{path} is a folder, but none that `datasets` wrote with save_to_disk: name a file in it, as "
            f"{path}/train.jsonl."
        )
    datasets = _datasets(f"{path} is a folder of the `datasets` library")
    try:
        found = datasets.load_from_disk(str(path))
    except _faults(datasets) as error:
        raise DataError(f"{path} cannot be read by `datasets` ({_first_line(error)}): save it anew.") from error
    return _values(found, str(path), split)


def hub_values(name: str, config: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a dataset on the hub, downloaded to the library's cache if need be. Raises DataError."""
    datasets = _datasets(f"{name} is no local file or folder, so it is taken for a dataset on the hub")
    try:
        found = datasets.load_dataset(name, config)
    except _faults(datasets) as error:
        raise DataError(
            f"{name} is no local file or folder, and `datasets` cannot get it from the hub "
            f"({_first_line(error)}): check the name, the config (org/name/config) and the connection."
        ) from error
    return _values(found, name if config is None else f"{name}/{config}", split)


def _datasets(why: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{why}, which needs that library: install it with {INSTALL}.") from error
    return datasets


def _faults(datasets: ModuleType) -> tuple[type[Exception], ...]:
    # Missing or empty files, no connection, unknown configs, scripts that are not run, files that do not parse.
    return (OSError, ValueError, RuntimeError, LookupError, TypeError, datasets.exceptions.DatasetsError)


def _values(found: Any, name: str, split: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one split: the one asked for, else `train`, else the only one."""
    if not isinstance(found, Mapping):
        if split is not None:
            raise DataError(f"{name} is one dataset without splits: leave out {split!r}.")
        return _plain(found)
    wanted = split or (DEFAULT_SPLIT if DEFAULT_SPLIT in found or len(found) != 1 else next(iter(found)))
    if wanted not in found:
        splits = ", ".join(sorted(found))
        raise DataError(f"{name} has no split {wanted!r}: name one of {splits}, as {name}:{sorted(found)[0]}.")
    return _plain(found[wanted])


def _plain(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows of Python's own types, whatever form (numpy, torch) the dataset was saved with."""
    return iter(rows.with_format(None) if hasattr(rows, "with_format") else rows)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
