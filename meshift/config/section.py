"""A group of config keys: typed, immutable, refusing keys it does not know.

It knows nothing of which keys there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Off(NamedTuple):
    """Another key of the section, and its values that switch something off."""

    key: str
    values: tuple[Any, ...]


class Section(BaseModel):
    """A group of keys. Immutable; keyword-only; refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    NOT_HERE: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys of other runs that one may think this one has, and why it has not."""

    IDLE: ClassVar[Mapping[str, Off]] = MappingProxyType({})
    """Keys that do nothing while another has some values: they are then refused, unless at their default."""

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        # `ppo:` with nothing below it, or only comments, is null in YAML and means the defaults.
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str) and "\0" in value:  # no path may hold one, and no text needs one
                raise ValueError(f"`{key}` holds a NUL character; remove it")
        return {} if values is None else values

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take `batch_size: yes` for 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        types = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and types & {int, float} and bool not in types:
            raise ValueError(f"write a number, not {value}")
        return value

    @model_validator(mode="after")
    def _no_key_does_nothing(self) -> Self:
        for key, off in self.IDLE.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            switch = getattr(self, off.key)
            if switch in off.values and value != default:
                raise ValueError(
                    f"{key} is {_in_yaml(value)}, but does nothing while {off.key} is {_in_yaml(switch)}; change "
                    f"{off.key}, or set {key} back to {_in_yaml(default)}"
                )
        return self


def _in_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
