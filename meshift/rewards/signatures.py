"""Whose signature a reward function has, told by the names of its parameters, and the arguments that it is given.

It calls no function, and knows nothing of processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meshift.rewards.samples import Samples

RewardFunction = Callable[..., Any]
Flavour = Literal["TRL", "verl", "verl batch", "OpenRLHF"]

RESERVED_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a function of TRL's signature is given besides columns: no column can have one of these names."""
ARGUMENTS: dict[Flavour, tuple[str, ...]] = {
    "TRL": RESERVED_ARGUMENTS,
    "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
    "verl batch": ("data_sources", "solution_strs", "ground_truths", "extra_infos"),
    "OpenRLHF": ("queries", "prompts", "labels"),
}
# By which parameter a flavour is known. In this order: a TRL function may name a column as it likes.
MARKS: tuple[tuple[Flavour, tuple[str, ...]], ...] = (
    ("TRL", ("completions", "completion_ids")),
    ("verl", ("solution_str",)),
    ("verl batch", ("solution_strs",)),
    ("OpenRLHF", ("queries",)),
    ("TRL", ("prompts",)),
)
TRUTHS = {
    "verl": ("reward_model", "ground_truth", "answer", "label"),
    "OpenRLHF": ("label", "answer", "ground_truth", "reward_model"),
}
"""Columns that may hold the right answer, best first; in `reward_model` it is the key `ground_truth`."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a function takes. `names` are all its parameters; `takes_any` says that it has `**kwargs`."""

    flavour: Flavour
    names: frozenset[str]
    required: tuple[str, ...]
    takes_any: bool
    is_async: bool

    @property
    def per_sample(self) -> bool:
        """Whether it is called once for every sample."""
        return self.flavour == "verl"

    def takes(self, name: str) -> bool:
        """Whether it may be given an argument of this name."""
        return self.takes_any or name in self.names


def read_signature(function: RewardFunction) -> Signature | None:
    """The function's signature, or None where its parameters are those of none that we know."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not say
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in variadic]
    names = frozenset(p.name for p in named)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    flavour = _flavour(names, takes_any)
    if flavour is None:
        return None
    return Signature(
        flavour=flavour,
        names=names,
        required=tuple(p.name for p in named if p.default is p.empty),
        takes_any=takes_any,
        is_async=inspect.iscoroutinefunction(function)
        or inspect.iscoroutinefunction(getattr(function, "__call__", None)),  # noqa: B004 - an object may be async
    )


def _flavour(names: frozenset[str], takes_any: bool) -> Flavour | None:
    known = (flavour for flavour, marks in MARKS if names & set(marks))
    return next(known, "TRL" if takes_any else None)


def unknown_signature(name: str) -> str:
    """The sentence for a function that `read_signature` does not know."""
    forms = "; ".join(f"{flavour} {', '.join(ARGUMENTS[flavour][:3])}" for flavour in ("TRL", "verl", "OpenRLHF"))
    return (
        f"reward function {name} has none of the parameter lists that are known ({forms}); name its parameters so"
    )


def given_names(signature: Signature, columns: Sequence[str]) -> set[str]:
    """The arguments that can be given where the data has these columns."""
    given = set(ARGUMENTS[signature.flavour])
    if signature.flavour == "TRL":
        return given | (set(columns) - {"prompt"})
    if signature.flavour != "OpenRLHF" and not set(TRUTHS["verl"]) & set(columns):
        return given - {"ground_truth", "ground_truths"}
    return given


def make_calls(signature: Signature, samples: Samples, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each call: one for the batch, or one per sample; JSON values only, if the columns are."""
    match signature.flavour:
        case "TRL":
            calls = [_trl(samples)]
        case "verl":
            calls = _verl(samples)
        case "verl batch":
            rows = _verl(samples)
            calls = [{f"{name}s": [row[name] for row in rows] for name in ARGUMENTS["verl"]}]
        case "OpenRLHF":
            labels = [_truth(row, TRUTHS["OpenRLHF"], missing="") for row in _rows(samples)]
            calls = [{"queries": samples.queries, "prompts": samples.prompt_texts, "labels": labels}]
    return [{k: v for k, v in call.items() if signature.takes(k)} | dict(kwargs) for call in calls]


def _trl(samples: Samples) -> dict[str, Any]:
    return {
        **samples.columns,
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
        "trainer_state": {"global_step": samples.step, "max_steps": samples.max_steps},
    }


def _verl(samples: Samples) -> list[dict[str, Any]]:
    return [
        {
            "data_source": row.get("data_source", ""),
            "solution_str": text,
            "ground_truth": _truth(row, TRUTHS["verl"], missing=None),
            "extra_info": _extra_info(row.get("extra_info")),
        }
        for row, text in zip(_rows(samples), samples.texts, strict=True)
    ]


def _extra_info(value: Any) -> Any:
    """A copy, since the rows of one prompt share theirs; an empty one for a row without."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else value


def _rows(samples: Samples) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in samples.columns.items()} for i in range(len(samples))]


def _truth(row: Mapping[str, Any], names: Sequence[str], missing: Any) -> Any:
    for name in names:
        value = row.get(name)
        if name == "reward_model":
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return missing
