"""A group of config keys: typed, immutable, refusing keys it does not know.

It knows nothing of which keys there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    """A group of keys. Immutable; keyword-only; refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    NOT_HERE: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys of other runs that one may think this one has, and why it has not."""

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
