"""`report.html`: read runs, write one page, whole or not at all.

It knows nothing of how a page looks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from meshift.errors import ConfigError
from meshift.report.comparison_page import comparison_page
from meshift.report.run_data import name_runs, read_run
from meshift.report.run_page import run_page

REPORT = "report.html"


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write the report of one run, or the comparison of several, to `output`; returns it.

    A run may still be going, or have been killed. Raises `InputError` for a folder that is no run's, and
    `ConfigError` where the file cannot be written.
    """
    if not run_dirs:
        raise ConfigError("a report needs at least one run; name the output_dir of one")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    text = run_page(runs[0]) if len(runs) == 1 else comparison_page(list(zip(name_runs(runs), runs, strict=True)))
    unfinished = output.with_name(f".{output.name}.new")
    try:
        # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
        unfinished.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(unfinished, output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write the report to {output} ({error.strerror}); name another --output"
        ) from None
    return output
