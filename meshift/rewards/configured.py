"""The reward functions of a config: loaded, and checked against what the run and the data can give them.

It calls none of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError
from meshift.rewards.functions import WeightedFunction
from meshift.rewards.loading import load_function
from meshift.rewards.own import OWN, Loaded, load_own
from meshift.rewards.remote import RemoteReward
from meshift.rewards.signatures import (
    ARGUMENTS,
    TRUTHS,
    Signature,
    given_names,
    read_signature,
    unknown_signature,
)

TAKEN = ("mean", "std", "group_std", "frac_reward_zero_std", "overlong_penalty", "over_greedy", "reward_model")
"""What runs write as `reward/<name>` themselves: a function of such a name goes by its whole spec."""


def load_functions(configs: Sequence[RewardFunctionConfig]) -> list[WeightedFunction]:
    """Import every configured function. Raises `ConfigError` naming the one that is not there, or is no reward."""
    names = [_short_name(config.function) for config in configs]
    loaded = []
    for config, short in zip(configs, names, strict=True):
        name = config.function if names.count(short) > 1 or short in TAKEN else short
        found = _load(config)
        signature = read_signature(found.function)
        if signature is None:
            raise ConfigError(unknown_signature(name))
        if config.function not in OWN:
            _check_kwargs(name, signature, config.kwargs)
        loaded.append(
            WeightedFunction(
                name=name,
                function=found.function,
                weight=config.weight,
                spec=found.spec,
                timeout_s=found.timeout_s,
                on_error=config.on_error,
                kwargs=found.kwargs,
                plain=found.plain,
            )
        )
    return loaded


def _short_name(spec: str) -> str:
    return spec.rstrip("/").rpartition("/" if "://" in spec else ":")[2]


def _load(config: RewardFunctionConfig) -> Loaded:
    """The function, and where a process of its own would find it."""
    spec = config.function
    if spec in OWN:
        return load_own(spec, config.kwargs, config.timeout_s)
    if "://" in spec:
        remote = RemoteReward(spec, config.timeout_s)
        return Loaded(function=remote, spec=None, timeout_s=config.timeout_s, kwargs=config.kwargs)
    if ":" not in spec:
        close = difflib.get_close_matches(spec, list(OWN), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; those of Meshift's own are {', '.join(OWN)}."
        raise ConfigError(
            f"there is no reward function {spec!r}{hint} Write one of yours as file.py:name or module:name"
        )
    place, _, name = spec.rpartition(":")
    absolute = f"{Path(place).absolute()}:{name}" if place.endswith(".py") else spec
    function = load_function(spec)
    return Loaded(function=function, spec=absolute, timeout_s=config.timeout_s, kwargs=config.kwargs)


def _check_kwargs(name: str, signature: Signature, kwargs: Mapping[str, Any]) -> None:
    for key in kwargs:
        if key in ARGUMENTS[signature.flavour]:
            raise ConfigError(f"reward function {name} is given {key!r} by the run; remove it from its kwargs")
        if not signature.takes(key):
            known = ", ".join(sorted(signature.names - set(ARGUMENTS[signature.flavour]))) or "none"
            raise ConfigError(
                f"reward function {name} takes no parameter {key!r}, which its kwargs name (it has, besides what "
                f"the run gives: {known})"
            )


def check_columns(functions: Sequence[WeightedFunction], columns: Sequence[str]) -> None:
    """Raise `ConfigError` where a function needs an argument that the data's columns cannot give it."""
    for weighted in functions:
        signature = read_signature(weighted.function)
        if signature is None:
            raise ConfigError(unknown_signature(weighted.name))
        if hasattr(weighted.function, "check_columns"):
            weighted.function.check_columns(columns)
        given = given_names(signature, columns)
        twice = sorted(set(weighted.kwargs) & given)
        if twice:
            raise ConfigError(
                f"reward function {weighted.name}: {twice[0]!r} is among its kwargs and a column of the data; "
                "remove one"
            )
        missing = next((n for n in signature.required if n not in given and n not in weighted.kwargs), None)
        if missing is not None:
            raise ConfigError(_missing_sentence(weighted.name, missing, signature, columns))


def _missing_sentence(name: str, missing: str, signature: Signature, columns: Sequence[str]) -> str:
    others = ", ".join(sorted(set(columns) - {"prompt"})) or "none"
    if signature.flavour == "TRL":
        return (
            f"reward function {name} needs {missing!r}, which is no column of the data (its columns besides "
            f"prompt: {others}); add that column, or give the parameter a default or a value in kwargs"
        )
    if missing.startswith("ground_truth"):
        return (
            f"reward function {name} needs {missing!r}, but the data has none of the columns "
            f"{', '.join(TRUTHS['verl'])} (its columns besides prompt: {others}); add one"
        )
    return (
        f"reward function {name} needs {missing!r}, which {signature.flavour} functions are not given; give the "
        "parameter a default, or a value in kwargs"
    )


def describe_functions(functions: Sequence[WeightedFunction]) -> str:
    """For a dry run: "1 x judge (TRL) + 0.5 x compute_score (verl)"."""
    signatures = [(weighted, read_signature(weighted.function)) for weighted in functions]
    return " + ".join(
        f"{w.weight:g} x {w.name} ({w.function.describe() if hasattr(w.function, 'describe') else s.flavour})"
        for w, s in signatures
        if s is not None
    )
