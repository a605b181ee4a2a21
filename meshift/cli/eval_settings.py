"""How completions are drawn, by `meshift eval`'s options; or how those of a file were, by what stands beside it.

It knows nothing of scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from meshift.cli.generate import add_sampling_options
from meshift.errors import InputError

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "dtype": "auto", "chat": False, "num_samples": 1}
)
HOW_DRAWN = ("temperature", "top_k", "top_p", "chat", "max_new_tokens")
"""What of a file's completions cannot be otherwise now. Seed and type are of the scoring too."""
TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("temperature", "top_p"), (float, int)),
        **dict.fromkeys(("top_k", "max_new_tokens", "seed"), (int,)),
        "dtype": (str,),
        "chat": (bool,),
    }
)


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Options that are None where they are not given."""
    add = parser.add_argument
    add("--chat", action="store_true", help="ask through the model's chat template")
    add("--num-samples", type=int, metavar="N", help="completions per question; default 1")
    add("--max-new-tokens", type=int, metavar="N", help="default: 256 to 1024, by task")
    add_sampling_options(parser, temperature=DEFAULTS["temperature"])
    parser.set_defaults(**dict.fromkeys(DEFAULTS))


def settled(args: argparse.Namespace) -> tuple[argparse.Namespace, Mapping[str, Any] | None]:
    """The options with those that were not given: of an evaluation's own `--completions`, as its drawing.json has
    them, which comes second. Raises `InputError` for an option that says otherwise than that file."""
    drawn = None
    if args.completions is not None:
        from meshift.evaluation.drawn_folder import drawing_beside

        drawn = drawing_beside(Path(args.completions))
    found = argparse.Namespace(**vars(args))
    for name in (*DEFAULTS, "max_new_tokens"):
        value, was = getattr(args, name), _was(args.completions, drawn, name)
        if value is None:
            setattr(found, name, DEFAULTS.get(name) if was is None else was)
        elif was is not None and was != value and name in HOW_DRAWN:
            raise InputError(
                f"{args.completions} was drawn with {name} {was!r}, and --{name.replace('_', '-')} is {value!r}; "
                "leave it out, or draw anew"
            )
    return found, drawn


def _was(completions: str, drawn: Mapping[str, Any] | None, name: str) -> Any:
    value = None if drawn is None or name not in TYPES else drawn.get(name)
    if value is not None and type(value) not in TYPES[name]:
        raise InputError(
            f"the drawing.json beside {completions} has {name} {value!r}, which none can be; restore it"
        )
    return value


def recorded(args: argparse.Namespace, drawn: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options for `results.json`: of a file's completions nothing that nobody knows."""
    values = dict(vars(settled(args)[0]))
    if args.completions is not None:
        values["num_samples"] = None
        known = drawn or {}
        values |= {name: known.get(name, getattr(args, name)) for name in HOW_DRAWN if name != "chat"}
    return values
