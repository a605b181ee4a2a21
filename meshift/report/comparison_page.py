"""The report of several runs: where their configs differ, their final figures, their curves laid over each other.

It arranges what the other modules draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from meshift.report.catalogue import BY_SOURCE, EXACT, Chart, Group, charts_for
from meshift.report.completion_tables import MAX_PROMPTS, last_fixed, side_by_side
from meshift.report.differences import differences
from meshift.report.document import document, number_table, section
from meshift.report.line_chart import Caption, Line, line_chart
from meshift.report.markup import Markup, element
from meshift.report.numbers import DASH, counted, duration, short
from meshift.report.run_data import RunData
from meshift.report.run_page import KEY_FIGURES, METHODS, anchor, header, same, verdict_list
from meshift.report.timeline import STEP_TIME, colour, legend, share_bar, timeline_of
from meshift.report.verdicts import diagnose

NUM_COLOURS = 8
Runs = Sequence[tuple[str, RunData]]


def comparison_page(runs: Runs) -> str:
    """The whole page, of named runs."""
    title = f"Comparison of {counted(len(runs), 'run')}"
    methods = sorted({METHODS.get(run.method, "training") for _, run in runs})
    return document(
        title,
        header(title, [", ".join(methods)]),
        element("p", *_legend(runs), class_="legend runs"),
        _final_figures(runs),
        _differences(runs),
        _verdicts(runs),
        *_curves(runs),
        _time(runs),
        _completions(runs),
    )


def _slot(position: int) -> int:
    return position % NUM_COLOURS


def _legend(runs: Runs) -> list[Markup]:
    return [
        element("span", element("i", class_=f"swatch c{_slot(i)}"), name, class_="entry")
        for i, (name, _) in enumerate(runs)
    ]


def _final_figures(runs: Runs) -> Markup:
    rows = [["Steps", *(f"{run.num_steps:,}" for _, run in runs)]]
    for key, label in KEY_FIGURES:
        if any(run.series(key).finite.size for _, run in runs):
            rows.append([f"{label}, first", *(short(run.series(key).first) for _, run in runs)])
            rows.append([f"{label}, last fifth", *(short(run.series(key).late) for _, run in runs)])
    rows.append(["Time per step", *(_mean_time(run) for _, run in runs)])
    return section("Final figures", number_table(["", *(name for name, _ in runs)], rows), anchor="figures")


def _mean_time(run: RunData) -> str:
    seconds = run.series(STEP_TIME).finite
    return duration(float(seconds.mean()) if seconds.size else float("nan"))


def _differences(runs: Runs) -> Markup:
    """The config keys whose values are not the same in all runs."""
    rows = differences([run for _, run in runs])
    head = ["", *(name for name, _ in runs)]
    shared, own = ([row for row in rows if (DASH in row) == is_own] for is_own in (False, True))
    parts = [number_table(head, shared, numbers=False)] if shared else []
    if own:
        said = f"{counted(len(own), 'key')} that not all of the runs have"
        parts.append(element("details", element("summary", said), number_table(head, own, numbers=False)))
    nothing = element("p", "The configurations are the same.")
    return section("What differs in the configuration", *(parts or [nothing]), anchor="differences")


def _verdicts(runs: Runs) -> Markup:
    parts = []
    for i, (name, run) in enumerate(runs):
        found = [diagnosis for diagnosis in diagnose(run) if diagnosis.severity != "good"]
        parts.append(element("h3", element("i", class_=f"swatch c{_slot(i)}"), name))
        parts.append(verdict_list(found) or element("p", "Nothing to remark."))
    return section("Diagnoses", *parts, anchor="diagnoses")


def _curves(runs: Runs) -> list[Markup]:
    keys = dict.fromkeys(key for _, run in runs for key in run.metrics)
    moving = [key for key in keys if not _still(runs, key)]
    return [_group(runs, group) for group in charts_for(moving)]


def _still(runs: Runs, key: str) -> bool:
    """Whether the metric has one value, the same in all runs."""
    series = [run.series(key) for _, run in runs if len(run.series(key))]
    return all(s.constant for s in series) and len({s.last for s in series}) <= 1


def _group(runs: Runs, group: Group) -> Markup:
    """One chart per metric, all runs in each; those of several sources of reward below a heading of their own."""
    shown: list[list[Line]] = []
    parts: list[Markup] = []
    for by_source, charts in groupby(group.charts, key=lambda chart: chart.title == BY_SOURCE):
        drawn = [one for chart in charts for one in _charts(runs, chart, shown)]
        if drawn and by_source:
            parts.append(element("h3", BY_SOURCE))
        parts += [element("div", *drawn, class_="grid")] if drawn else []
    return section(group.title, *parts, anchor=anchor(group.title))


def _charts(runs: Runs, chart: Chart, shown: list[list[Line]]) -> Iterator[Markup]:
    """A chart per line of the catalogue's, without those whose curves are in `shown`, as of the only source."""
    for key, label in chart.lines:
        lines = [
            Line(label=name, series=run.series(key), slot=_slot(i), exact=key in EXACT)
            for i, (name, run) in enumerate(runs)
            if len(run.series(key))
        ]
        if not any(_same_lines(lines, others) for others in shown):
            shown.append(lines)
            caption = Caption(title=_title(chart, label), key=key, note=chart.note)
            yield line_chart(caption, lines, raw=len(runs) <= 3)


def _title(chart: Chart, label: str) -> str:
    if chart.title == BY_SOURCE:
        return label
    return f"{chart.title}, {label}" if label and len(chart.lines) > 1 else chart.title


def _same_lines(ours: Sequence[Line], theirs: Sequence[Line]) -> bool:
    return [line.label for line in ours] == [line.label for line in theirs] and all(
        same(one.series, other.series) for one, other in zip(ours, theirs, strict=True)
    )


def _time(runs: Runs) -> Markup | None:
    """One bar per run: seconds per step by call, on a scale that all share."""
    means = [(name, timeline.means) for name, run in runs if (timeline := timeline_of(run)) is not None]
    if not means:
        return None
    calls = list(dict.fromkeys(call for _, by_call in means for call in by_call))
    kinds = {call: colour(call, _slot(i)) for i, call in enumerate(calls)}
    longest = max(sum(by_call.values()) for _, by_call in means) or 1.0
    rows = [
        element(
            "tr",
            element("th", name, scope="row"),
            element("td", duration(sum(by_call.values())), class_="number"),
            element("td", share_bar([(kinds[c], s / longest) for c, s in by_call.items()]), class_="bar"),
        )
        for name, by_call in means
    ]
    table = element("table", element("tbody", *rows), class_="times")
    entries = element("p", *legend(calls), class_="legend")
    return section("Seconds per step", entries, element("div", table, class_="scroll", tabindex=0), anchor="time")


def _completions(runs: Runs) -> Markup | None:
    """What the last weights of each run gave to the fixed prompts that the runs share."""
    last = [last_fixed(run) for _, run in runs]
    prompts = [prompt for prompt in last[0] if sum(prompt in samples for samples in last) > 1][:MAX_PROMPTS]
    if not prompts:
        return None
    rows = [[prompt, *(samples.get(prompt) for samples in last)] for prompt in prompts]
    return section("Completions at the end", side_by_side([name for name, _ in runs], rows), anchor="completions")
