"""YAML files and dotted overrides to a validated config, and a config's keys to text. Unknown keys are errors.

It knows nothing of which keys there are: it reads them off the schema.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from meshift.config.plan import AUTO
from meshift.config.section import Section
from meshift.errors import ConfigError
from meshift.yaml_values import apply_override, read_yaml

C = TypeVar("C", bound=Section)
LONGEST_SHOWN = 100
PLAN_FILES = (".yaml", ".yml", ".json")


def load_config(schema: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply `key.sub=value` overrides, validate. Raises `ConfigError` with one sentence."""
    return make_config(schema, read_values(path, overrides), where=_origin(path, overrides))


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested values of a YAML file (None: of nothing) with overrides, not yet validated.

    `plan: auto` and `plan: file.yaml` are written out as sections, so that overrides may go into them. Raises
    `ConfigError`.
    """
    values = with_plan(read_yaml(Path(path)) if path is not None else {})
    for override in overrides:
        apply_override(values, override)
        values = with_plan(values)
    return values


def with_plan(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the plan that `plan` names: `auto`, or a file that `meshift plan --out` or a user wrote."""
    plan = values.get("plan")
    if not isinstance(plan, str):
        return values
    return {**values, "plan": {AUTO: {}} if plan == AUTO else read_plan(Path(plan))}


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of a YAML or JSON file, which is under `plan` or all that the file holds. Raises `ConfigError`."""
    if path.suffix not in PLAN_FILES:
        raise ConfigError(
            f"`plan` is {str(path)!r}; write `auto`, a plan, or a file of one ({', '.join(PLAN_FILES)})"
        )
    if not path.is_file():
        raise ConfigError(f"there is no plan file {path}; `meshift plan --out {path}` writes one")
    values = read_yaml(path)
    plan = values.get("plan", values)
    if not isinstance(plan, dict):
        raise ConfigError(f"`plan` of {path} must hold roles and their placements, not a {type(plan).__name__}")
    return plan


def _origin(path: str | Path | None, overrides: Sequence[str]) -> str:
    if path is None:
        return "the command line"
    return f"{path} and the command line" if overrides else str(path)


def make_config(schema: type[C], values: Mapping[str, Any], where: str = "the configuration") -> C:
    """Validate a nested dictionary. Raises `ConfigError` with one sentence."""
    unknown = next(unknown_keys(schema, values), None)
    if unknown is not None:
        raise ConfigError(_unknown_key_sentence(schema, unknown))
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_validation_sentence(error, where)) from None


def config_problems(
    schema: type[Section], values: Mapping[str, Any], where: str = "the configuration"
) -> list[str]:
    """One sentence for each thing that `make_config` would refuse; empty where it takes the values."""
    problems = [_unknown_key_sentence(schema, key) for key in unknown_keys(schema, values)]
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["type"] != "extra_forbidden":  # the unknown keys, which are told better above
                problems.append(_detail_sentence(detail, where))
        if not problems:
            problems.append(_validation_sentence(error, where))
    return problems


def dump_config(config: Section) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_keys(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a schema as (dotted key, default, description); `functions[].weight` is a key of list items."""
    for name, info in schema.model_fields.items():
        section = _section_of(info)
        if section is None:
            default = "required" if info.is_required() else yaml.safe_dump(info.default, default_flow_style=True)
            yield prefix + name, default.removesuffix("\n...\n").strip(), _described(info)
            item = _item_section_of(info)
            if item is not None:
                yield from describe_keys(item, f"{prefix}{name}[].")
        else:
            may_be_left_out = section is not info.annotation
            for key, default, description in describe_keys(section, f"{prefix}{name}."):
                yield key, "null" if may_be_left_out else default, description


def _section_of(info: FieldInfo) -> type[Section] | None:
    """The section that a key is, also one that may be left out."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind if get_origin(info.annotation) is not list else None
    return None


def _item_section_of(info: FieldInfo) -> type[Section] | None:
    """The section that each item of a list is, or None."""
    items = get_args(info.annotation) if get_origin(info.annotation) is list else ()
    return items[0] if items and isinstance(items[0], type) and issubclass(items[0], Section) else None


def _described(info: FieldInfo) -> str:
    choices = list(_choices(info.annotation))
    return (info.description or "") + (f" ({', '.join(choices)})" if choices else "")


def _choices(annotation: Any) -> Iterator[str]:
    """The values of the `Literal` in a type, at any depth."""
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(argument)
        else:
            yield from _choices(argument)


def unknown_keys(schema: type[Section], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested values that a schema does not know; of an unknown section, its name alone."""
    for name, value in values.items():
        info = schema.model_fields.get(str(name))
        if info is None:
            yield f"{prefix}{name}"
            continue
        section, item = _section_of(info), _item_section_of(info)
        if section is not None and isinstance(value, Mapping):
            yield from unknown_keys(section, value, f"{prefix}{name}.")
        if item is not None and isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    yield from unknown_keys(item, entry, f"{prefix}{name}[{i}].")


def _unknown_key_sentence(schema: type[Section], unknown: str) -> str:
    if unknown in schema.NOT_HERE:
        return f"`{unknown}` {schema.NOT_HERE[unknown]}; take it out"
    known = [key for key, _, _ in describe_keys(schema)]
    sections = {key.rpartition(".")[0] for key in known}
    close = difflib.get_close_matches(unknown, [*known, *sorted(sections)], n=1, cutoff=0.6)
    leaf = unknown.rsplit(".", 1)[-1]
    close = close or [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"did you mean `{close[0]}`?" if close else "--help-config lists the keys"
    return f"unknown key `{_on_one_line(unknown)}`; {hint}"


def _validation_sentence(error: ValidationError, where: str) -> str:
    return _detail_sentence(error.errors(include_url=False)[0], where)


def _detail_sentence(first: ErrorDetails, where: str) -> str:
    key = _on_one_line(".".join(str(part) for part in first["loc"]))
    problem = " ".join(first["msg"].removeprefix("Value error, ").split())
    problem = problem[:1].lower() + problem[1:]
    if first["type"] == "extra_forbidden":
        return f"unknown key `{key}` in {where}; --help-config lists the keys"
    if first["type"] == "missing":
        return f"`{key}` is needed in {where}, and is not there"
    if not key:
        return f"{problem} (in {where})"
    if first["type"] == "value_error":
        return f"`{key}` in {where}: {problem}"
    return f"`{key}` in {where}: {problem}, not {_on_one_line(repr(first['input']))}"


def _on_one_line(text: str) -> str:
    """What a user wrote, so that a sentence can hold it: line breaks and their like escaped, its end left out."""
    shown = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
