"""Parquet files, read with pyarrow in batches; it knows no columns. pyarrow is part of the extra `data`."""

from collections.abc import Iterator
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
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Parquet file that can be read ({error}): write it anew.") from error
