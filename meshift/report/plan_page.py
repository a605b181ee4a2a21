"""A plan as a page: a step on its devices, its calls in figures, and why it is what it is.

It knows nothing of how the plan was found.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshift.layout.mesh import Mesh
from meshift.planner.explain import explanation, of_calls, of_proof, of_rivals
from meshift.planner.figures import figure
from meshift.planner.footprint import PARTS, WORDS, alike, worst
from meshift.planner.planning import Planned
from meshift.planner.variants import Variant, head, table_rows
from meshift.planner.written import devices_of
from meshift.report.device_chart import Bar, device_chart
from meshift.report.document import document, number_table, section
from meshift.report.markup import Markup, element
from meshift.report.scaling_curve import scaling_curve

MAX_ROWS = 32
"""More devices than this are shown by hosts."""


def plan_page(planned: Planned, variants: Sequence[list[Variant]] = (), more: Sequence[str] = ()) -> str:
    """The whole page, which needs no other file.

    `variants` are what was asked with `--what-if`, by key; `more` are sentences to stand after the reasons.
    """
    problem = planned.problem
    title = f"A plan for {problem.num_devices} {problem.hardware.name}: {figure(planned.seconds)} s a step"
    reasons = element("ul", *(element("li", sentence) for sentence in (*explanation(planned), *more)))
    by_hand = [list(row) for row in of_rivals(planned)]
    return document(
        title,
        element("h1", title),
        element("p", of_proof(planned)),
        section("A step", _chart(planned), anchor="step"),
        section("Calls", _calls(planned), anchor="calls"),
        section("Memory", *_memory(planned), anchor="memory"),
        section("Plans by hand", number_table(["plan", "a step"], by_hand, numbers=False), anchor="by-hand"),
        section("Reasons", reasons, anchor="reasons"),
        section("What if", *map(_what_if, variants), anchor="what-if") if variants else None,
    )


def _what_if(found: list[Variant]) -> Markup:
    """A table of a key's values, and where they are numbers, the curve of throughput over them."""
    key = found[0].key
    table = number_table(head(key), table_rows(found))
    curve = scaling_curve(found)
    return element("div", element("h3", key), element("div", table, curve, class_="beside") if curve else table)


def _chart(planned: Planned) -> Markup:
    problem = planned.problem
    by_host = problem.num_devices > MAX_ROWS
    each = problem.hardware.per_host if by_host else 1
    bars: list[Bar] = []
    for event in (event for event in planned.events if event.end > event.start):
        numbers = [device.index + problem.hardware.per_host * _host(device.host) for device in event.devices]
        rows = sorted({number // each for number in numbers})
        seconds = event.end - event.start
        bars.append(Bar(name=event.name, position=len(bars), start=event.start, seconds=seconds, processes=rows))
    return device_chart(bars, "host" if by_host else "device")


def _host(name: str) -> int:
    return int(name.removeprefix("node") or 0)


def _calls(planned: Planned) -> Markup:
    rows, devices = [], devices_of(planned.problem, planned.choice)
    for op in planned.problem.ops:
        event = next(event for event in planned.events if event.name == op.name)
        if op.kind != "call":
            continue
        spot = planned.choice[op.uses[0]]
        seconds, memory = figure(event.end - event.start), f"{event.peak / 1e9:.1f}"
        rows.append([op.name, str(spot.candidate.layout), devices[op.uses[0]], seconds, memory])
    return number_table(["call", "layout", "devices", "seconds", "memory, GB"], rows)


def _memory(planned: Planned) -> tuple[Markup, ...]:
    """Of each call the device that needs the most, by what it holds; and the peak of all devices in all calls."""
    found = of_calls(planned)
    tightest = {call: worst(devices) for call, devices in found.items()}
    used = [part for part in PARTS if any(one.parts[part] for one in tightest.values())]
    rows = [
        [call, str(one.device), *(_gigabytes(one.parts[part]) for part in used), _gigabytes(one.total)]
        for call, one in tightest.items()
    ]
    groups = [
        [str(Mesh(devices=tuple(group.devices))), *(_gigabytes(peak) for peak in group.peaks.values())]
        for group in alike(found)
    ]
    capacity = planned.problem.capacity / 1e9
    return (
        element("p", f"GB. A device has {capacity:.1f} for models and calls.", class_="hint"),
        element("h3", "Each call, on the device that needs the most"),
        number_table(["call", "device", *(WORDS[part] for part in used), "in all"], rows),
        element("h3", "Each device, in each call"),
        number_table(["devices", *found], groups),
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size else ""
