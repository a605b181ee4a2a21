"""The same request with one thing changed, several times: what each takes, as rows of a table or a curve.

It knows nothing of how a request is changed or planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshift.planner.figures import figure
from meshift.planner.planning import Planned

AS_IT_IS, DEVICES = "as it is", "devices"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A plan for a request in which `key` has this value; `number` is the value as one."""

    key: str
    value: str
    number: float
    planned: Planned

    @property
    def shown(self) -> str:
        """In a table."""
        return self.value if self.value != AS_IT_IS else f"{self.number:g} ({AS_IT_IS})"

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.planned.lacking <= 0

    @property
    def throughput(self) -> float:
        """Sequences a second."""
        return max(call.texts.num_sequences for call in self.planned.problem.step.calls) / self.planned.seconds

    @property
    def tokens(self) -> float:
        """Tokens of the most numerous texts, prompts and completions, a second."""
        texts = max((call.texts for call in self.planned.problem.step.calls), key=lambda one: one.num_sequences)
        return texts.num_rows(share_prefixes=False) / self.planned.seconds


def efficiency(variant: Variant, least: Variant) -> float:
    """Throughput for each device, over that of the smallest cluster that fits."""
    own, others = variant.planned.problem.num_devices, least.planned.problem.num_devices
    return variant.throughput / own / (least.throughput / others)


def table_rows(variants: list[Variant]) -> list[list[str]]:
    """Of one key: what `head` says, or what is short."""
    fitting = [one for one in variants if one.fits]
    least = min(fitting, key=lambda one: one.planned.problem.num_devices, default=None)
    rows = []
    for one in variants:
        if not one.fits or least is None:
            short = f"does not fit: {one.planned.lacking / 1e9:.1f} GB too much on a device"
            rows.append([one.shown, short, *[""] * (len(head(one.key)) - 2)])
            continue
        rows.append(
            [
                one.shown,
                figure(one.planned.seconds),
                figure(one.throughput),
                f"{one.tokens:,.0f}",
                *([f"{efficiency(one, least):.0%}"] if one.key == DEVICES else []),
                f"{one.planned.gap:.1%}",
            ]
        )
    return rows


def head(key: str) -> list[str]:
    """The columns: of devices, how much of the smallest cluster's throughput is left for each, too."""
    shared = ["step, s", "sequences a second", "tokens a second"]
    return [key, *shared, *(["efficiency"] if key == DEVICES else []), "proven gap"]
