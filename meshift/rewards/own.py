"""Meshift's own reward functions by name: their keys, how long they may take, and what must be installed.

It calls none of them, and imports none before it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from meshift.config.loading import make_config
from meshift.config.reward_kwargs import FormatConfig, LengthConfig, MathsConfig, RatingConfig, ReasoningGymConfig
from meshift.config.section import Section
from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import ConfigError
from meshift.rewards.code.unit_tests import UnitTests
from meshift.rewards.loading import load_function
from meshift.rewards.rating import RatingJudge
from meshift.rewards.shapes import Length
from meshift.rewards.signatures import RewardFunction


@dataclass(frozen=True, kw_only=True)
class OwnFunction:
    """Either made in the run's process (`make`), keeping its own time; or found by `spec` in a process of its own,
    which is killed after `timeout_s` unless the config says another time.

    One with a `plain` completion compares completions with right answers: see `AnswerInvoker`.
    `module` of the extra `extra` must be there.
    """

    schema: type[Section]
    make: Callable[[Any], RewardFunction] | None = None
    spec: str = ""
    timeout_s: float | None = None
    plain: str | None = None
    module: str | None = None
    extra: str = ""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A function with what it is called by. `spec` and `timeout_s` are None where it keeps its own time."""

    function: RewardFunction
    spec: str | None
    timeout_s: float | None
    kwargs: Mapping[str, Any]
    plain: str | None = None


OWN: Mapping[str, OwnFunction] = {
    "unit_tests": OwnFunction(schema=UnitTestsConfig, make=UnitTests),
    "maths": OwnFunction(
        schema=MathsConfig,
        spec="meshift.rewards.maths:maths",
        timeout_s=3.0,
        plain="\\boxed{0}",
        module="math_verify",
        extra="math",
    ),
    "format": OwnFunction(schema=FormatConfig, spec="meshift.rewards.shapes:matches", timeout_s=5.0),
    "length": OwnFunction(schema=LengthConfig, make=Length),
    "reasoning_gym": OwnFunction(
        schema=ReasoningGymConfig,
        spec="meshift.rewards.reasoning:reasoning_gym",
        timeout_s=60.0,
        module="reasoning_gym",
        extra="reasoning",
    ),
    "judge": OwnFunction(schema=RatingConfig, make=RatingJudge),
}


def load_own(name: str, kwargs: Mapping[str, Any], timeout_s: float | None) -> Loaded:
    """The function, with all keys that its `kwargs` leave out. Raises `ConfigError`."""
    own = OWN[name]
    if own.module is not None and importlib.util.find_spec(own.module) is None:
        raise ConfigError(
            f"reward function {name} needs {own.module.replace('_', '-')}, which is not installed; run "
            f"`pip install 'meshift[{own.extra}]'`"
        )
    config = make_config(own.schema, kwargs, f"the kwargs of reward function {name}")
    if own.make is None:
        limit = own.timeout_s if timeout_s is None else timeout_s
        function = load_function(own.spec)
        keys = config.model_dump()
        return Loaded(function=function, spec=own.spec, timeout_s=limit, kwargs=keys, plain=own.plain)
    if timeout_s is not None:
        raise ConfigError(f"reward function {name} has its own time limits; put them in its kwargs")
    return Loaded(function=own.make(config), spec=None, timeout_s=None, kwargs={})
