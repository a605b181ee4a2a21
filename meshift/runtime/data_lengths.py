"""How long a config's texts are, by the first rows of its data, where data and tokenizers are here already.

Nothing is obtained for it: no package, nothing of the hub's. It knows nothing of plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.config.runs import RolloutRunConfig, RunConfig
from meshift.data.dataset import dataset_rows, is_here
from meshift.data.names import parse_name
from meshift.data.packages import is_kept, is_package_name
from meshift.errors import MeshiftError
from meshift.planner.rollout_steps import Lengths
from meshift.runtime.outlook import lengths_of
from meshift.runtime.spread_run import METHODS

NUM_ROWS = 256
"""That are read: means of more would not be much nearer."""


@dataclass(frozen=True, kw_only=True)
class DataLengths:
    """Means, and of how many rows of what, in words."""

    lengths: Lengths
    told: str


def lengths_here(config: RunConfig) -> DataLengths | None:
    """Means over the first rows of the config's data; None where they cannot be read here at once."""
    method = METHODS[type(config)]
    try:
        names = method.models(config)
        read = [names["actor"]] if isinstance(config, RolloutRunConfig) else names.values()  # for tokenizers
        if not is_here(config.data.dataset_name) or not all(map(_is_model_here, read)):
            return None
        rows = method.rows(_of_first_rows(config))
        found = lengths_of(config, rows)
    except (MeshiftError, OSError, ValueError, ImportError):  # what is wrong with the data, the run says
        return None
    return DataLengths(lengths=found, told=f"{len(rows)} rows of {config.data.dataset_name}")


def _of_first_rows(config: Any) -> Any:
    """The config with a slice of its data, and nothing of what is held out."""
    changes: dict[str, Any] = {"dataset_name": _first_rows(config.data.dataset_name)}
    if hasattr(config.data, "eval_dataset_name"):
        changes["eval_dataset_name"] = None
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _first_rows(dataset_name: str) -> str:
    """The first rows of what a name stands for, by a slice."""
    name = parse_name(dataset_name)
    whole = name.source if name.split is None else f"{name.source}:{name.split}"
    start, stop = 0, NUM_ROWS
    if name.part is not None:
        bounds = (name.part.start, name.part.stop)
        count = sum(1 for _ in dataset_rows(whole)) if name.part.needs_count else 1 << 62
        start = 0 if bounds[0] is None else bounds[0].row(count)
        stop = min(start + NUM_ROWS, count if bounds[1] is None else bounds[1].row(count))
    return f"{whole}[{start}:{stop}]"


def _is_model_here(name: str) -> bool:
    return is_kept(name) if is_package_name(name) else Path(name).is_dir()
