"""The element types of a reallocation: held by the source, sent, wanted by the target; their sizes.

Names are torch's, without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NUM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "float64": 8,
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "uint8": 1,
    }
)


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """What the source holds and what the target wants. `ValueError` for a name that is not in `NUM_BYTES`.

    Example: fp32 masters that become a generator's weights are `Dtypes(source="float32", target="bfloat16")`.
    """

    source: str = "bfloat16"
    target: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in (self.source, self.target):
            if name not in NUM_BYTES:
                raise ValueError(f"{name} is none of the types {', '.join(NUM_BYTES)}.")

    @property
    def wire(self) -> str:
        """What is sent: the narrower of the two. The sender narrows, the receiver widens."""
        return self.source if NUM_BYTES[self.source] < NUM_BYTES[self.target] else self.target

    @property
    def wire_size(self) -> int:
        """Bytes of one number on the wire."""
        return NUM_BYTES[self.wire]
