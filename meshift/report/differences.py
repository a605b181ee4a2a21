"""Where the configs of runs differ, of all that they use: sections of roles that a run does not have say nothing.

It knows nothing of pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshift.report.numbers import DASH
from meshift.report.run_data import ROLLOUT_METHODS, RunData

UNTOLD = ("output_dir", "overwrite_output_dir", "resume")
"""Config keys that differ between any two runs and say nothing."""
NOTHING = "null"
READ_BY_KL = (*(method for method in ROLLOUT_METHODS if method != "ppo"), "raft")
"""Methods that hold a reference where their `kl_coef` is above 0."""


def differences(runs: Sequence[RunData]) -> list[list[str]]:
    """A row for each key whose values are not the same in all runs: the key, then what each run has, a dash where
    it has no such key. A key that one run has as null and another has not at all is no difference."""
    configs = [used_keys(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in UNTOLD)
    rows = [[config.get(key) for config in configs] for key in keys]
    return [
        [key, *(DASH if value is None else value for value in row)]
        for key, row in zip(keys, rows, strict=True)
        if len({NOTHING if value is None else value for value in row}) > 1
    ]


def used_keys(run: RunData) -> dict[str, str]:
    """The run's config as dotted keys and texts, without its idle roles."""
    idle = [f"{place}{role}." for role in idle_roles(run) for place in ("", "plan.")]
    return {key: value for key, value in flattened(run.config).items() if not key.startswith(tuple(idle))}


def idle_roles(run: RunData) -> list[str]:
    """Roles that have a section in the config, and no part in the run: costs where nothing tells them, the critic
    that is a head of the actor, the reference that no objective reads."""
    found = []
    if not run.setting("cost.model_name_or_path") and not run.setting("cost.functions"):
        found += ["cost", "cost_critic"]
    if run.setting("ppo.shared_trunk"):
        found.append("critic")
    if any(run.setting(f"{method}.kl_coef") == 0 for method in READ_BY_KL):
        found.append("reference")
    return found


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as dotted keys and texts."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = NOTHING if value is None else str(value)
    return found
