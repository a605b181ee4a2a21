"""Parquet files, read with pyarrow in batches; it knows no columns. pyarrow is part of the extra `data`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meshift.errors import DataError

INSTALL = "pip install 'meshift[data]'"
BATCH_ROWS = 1024


def parquet_values(path: Path) -> Iterator[dict[str, Any]]:
    """Each row as columns by name, nested types as lists and dicts. Raises DataError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file, which needs pyarrow: install it with {INSTALL}.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Parquet file that can be read ({error}): write it anew.") from error


def num_parquet_rows(path: Path) -> int:
    """As the file says of itself; it was read before, so that pyarrow is there."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


def _check_names(names: Sequence[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has more than one column {repeated[0]!r}: give each column a name of its own.")
