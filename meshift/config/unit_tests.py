"""The keys of the reward function `unit_tests`, which stand in its `kwargs`.

It knows nothing of how programs are run.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from meshift.config.section import Section


class UnitTestsConfig(Section):
    """What a generated program is worth, and what it may use."""

    credit: Literal["all", "partial"] = Field(
        "all", description="1 where all tests pass and else 0, or the part of the tests that pass"
    )
    timeout_s: float = Field(
        4.0, gt=0, description="processor seconds of one test (by the clock twice that and one more), at most"
    )
    total_timeout_s: float = Field(30.0, gt=0, description="seconds by the clock for all tests of one completion")
    memory_mb: int = Field(512, ge=16, description="memory of one program beside its interpreter's, at most")
    output_kb: int = Field(1024, ge=1, description="what a program may write into any one file, stdout among them")
    max_tests: int | None = Field(
        None, ge=1, description="tests of one problem that are run, the first (null: all)"
    )
    num_workers: int | None = Field(None, ge=1, description="programs at the same time (null: one per processor)")
    packages: list[str] = Field(
        [], description="folders of Python packages that programs may import (default: the standard library alone)"
    )
    sandbox: Literal["strict", "unsafe"] = Field(
        "strict", description="`unsafe` runs programs without the layers that this machine does not have"
    )
