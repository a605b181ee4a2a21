"""A run's metrics to Weights & Biases, where `report_to` names it.

It knows nothing of what the metrics mean. Project, entity and mode are the user's, by the variables WANDB_*.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshift.errors import ConfigError

PROJECT = "meshift"
INSTALL = "pip install 'meshift[wandb]'"


class WandbCurves:
    """One W&B run for a run's folder. Raises `ConfigError` where wandb is not installed."""

    def __init__(self, folder: Path) -> None:
        wandb = _wandb()
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run: Any = wandb.init(project=project, name=folder.resolve().name, dir=str(folder))

    def add(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log one step's finite metrics."""
        self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        """Finish the W&B run; what was logged is sent."""
        self._run.finish()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            f"`report_to` names wandb, which is not installed; run {INSTALL}, or take it out"
        ) from None
