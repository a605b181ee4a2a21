"""A group of config keys: typed, immutable, refusing keys it does not know.

It knows nothing of which keys there are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A group of keys. Immutable; keyword-only; refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        # `ppo:` with nothing below it, or only comments, is null in YAML and means the defaults.
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str) and "\0" in value:  # no path may hold one, and no text needs one
                raise ValueError(f"`{key}` holds a NUL character; remove it")
        return {} if values is None else values
