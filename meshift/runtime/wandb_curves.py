"""A run's metrics to Weights & Biases, where `report_to` names it.

It knows nothing of what the metrics mean. Project, entity and mode are the user's, by the variables WANDB_*.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshift.errors import ConfigError

PROJECT = "meshift"
INSTALL = "pip install 'meshift[wandb]'"
RUN_ID = "wandb_run_id"


class WandbCurves:
    """One W&B run for a run's folder, gone on with where the run is resumed.

    Raises `ConfigError` where wandb is not installed, nobody is logged in, or its server cannot be reached.
    """

    def __init__(self, folder: Path, *, resumed: bool = False) -> None:
        wandb = _wandb()
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                dir=str(folder),
                id=_run_id(folder / RUN_ID, resumed),
                resume="allow",
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"`report_to` names wandb, which does not begin a run ({reason}); run `wandb login`, set "
                "WANDB_MODE=offline, or take it out"
            ) from None

    def add(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log one step's finite metrics."""
        self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        """Finish the W&B run; what was logged is sent."""
        self._run.finish()


def _run_id(path: Path, resumed: bool) -> str:
    """The id by which W&B knows this folder's run: a new one, unless the run is resumed and has one."""
    if resumed and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            f"`report_to` names wandb, which is not installed; run {INSTALL}, or take it out"
        ) from None
