"""YAML files and `key.sub=value` overrides as plain nested values; whatever cannot be read is a `ConfigError`.

It knows no key; `config/` says which there are and what they may be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from meshift.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds ({} if it is empty). Raises `ConfigError` naming the file, and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; check the path given to --config") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a path with a NUL in it
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error}") from None
    try:
        values = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{_line(error)} is not valid YAML: {_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in nested values. Raises `ConfigError` quoting it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"cannot read the override {override!r}; write it as key.sub=value")
    try:
        value = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the value of the override {_shortened(override)!r} is not valid YAML ({_problem(error)})"
        ) from None
    if isinstance(value, str):
        value = _number_or_text(value)
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"the override {override!r} goes into {section!r}, which is not a section")
    values[leaf] = value


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one section; YAML itself would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The section, checked."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"the key `{key.value}` stands there twice; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    """What is wrong, on one line. Dates and numbers that are none (2024-13-45) are plain `ValueError`s."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = getattr(error, "problem", None) or str(error)
    return " ".join(text.split())


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


def _number_or_text(text: str) -> float | str:
    # YAML 1.1 reads 1e-5 as a string; on a command line it is a number.
    try:
        return float(text)
    except ValueError:
        return text
