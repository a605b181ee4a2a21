"""The report of one run: verdicts, key figures, curves, time, completions, config, environment.

It arranges what the other modules draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from meshift.report.catalogue import EXACT, Chart, Group, charts_for
from meshift.report.completion_tables import fixed_table, logged_table
from meshift.report.device_chart import bars_of, device_chart
from meshift.report.diagnosis import Diagnosis
from meshift.report.document import document, key_values, number_table, section
from meshift.report.line_chart import Caption, Line, line_chart
from meshift.report.markup import Markup, element
from meshift.report.numbers import counted, duration, short
from meshift.report.reconciled import PREDICTED
from meshift.report.reconciled_table import reconciled_section
from meshift.report.run_data import RunData
from meshift.report.series import Series
from meshift.report.timeline import STEP_TIME, time_table, timeline_chart, timeline_of
from meshift.report.verdicts import diagnose

METHODS = {
    "ppo": "PPO",
    "dpo": "DPO",
    "sft": "SFT",
    "reward": "Reward model",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "remax": "ReMax",
}
# Key figures of any method: those that a run has are shown, first value to last.
KEY_FIGURES = (
    ("reward/mean", "Reward"),
    ("objective/kl", "KL, nats a completion"),
    ("response_length/mean", "Completion length"),
    ("loss", "Loss"),
    ("eval/loss", "Held-out loss"),
    ("accuracy", "Accuracy"),
    ("eval/accuracy", "Held-out accuracy"),
    ("mean_token_accuracy", "Token accuracy"),
)


HINT = "Over steps: every step thin, the smoothed course thick."


def run_page(run: RunData) -> str:
    """The whole page."""
    title = f"{METHODS.get(run.method, 'Training')}: {run.name}"
    return document(
        title,
        _header(run, title),
        verdict_list(diagnose(run)),
        _figures(run),
        *_curves(run),
        _time(run),
        reconciled_section(run),
        _completions(run),
        _config(run),
        _environment(run),
        _all_metrics(run),
    )


def _header(run: RunData, title: str) -> Markup:
    planned = int(run.number("max_steps"))
    steps = (
        f"{run.num_steps:,} of {planned:,} steps" if planned > run.num_steps else counted(run.num_steps, "step")
    )
    facts = [run.model, steps, _total_time(run), str(run.path)]
    return header(title, [fact for fact in facts if fact])


def header(title: str, facts: Sequence[str]) -> Markup:
    """The heading, what stands below it, and the switch of the theme (which the script shows)."""
    switch = element("button", "light / dark", type="button", id="theme", hidden=True)
    line = element("p", *(element("span", fact) for fact in facts), class_="facts")
    return element("header", element("h1", title), switch, line)


def _total_time(run: RunData) -> str:
    seconds = run.series(STEP_TIME).finite
    return duration(float(seconds.sum())) if seconds.size else ""


def verdict_list(found: Sequence[Diagnosis]) -> Markup | None:
    """Every diagnosis with its severity in words."""
    items = [
        element(
            "li",
            element("span", diagnosis.severity, class_=f"chip {diagnosis.severity}"),
            element("div", element("strong", diagnosis.title), f" {diagnosis.text}"),
        )
        for diagnosis in found
    ]
    return element("ul", *items, class_="verdicts", aria_label="Diagnoses") if items else None


def _figures(run: RunData) -> Markup | None:
    tiles = []
    for key, label in KEY_FIGURES:
        series = run.series(key)
        if series.finite.size:
            moved = series.finite.size > 1 and not series.constant
            before = f"{short(series.first)} \N{RIGHTWARDS ARROW} " if moved else ""
            tiles.append(_tile(label, before, short(series.last)))
    step_time, throughput = run.series(STEP_TIME), run.series("perf/tokens_per_s")
    if step_time.finite.size:
        tiles.append(_tile("Time per step", "", duration(float(step_time.finite.mean()))))
    if throughput.finite.size:
        tiles.append(_tile("Tokens per second", "", short(float(throughput.finite.mean()))))
    return element("dl", *tiles, class_="tiles") if tiles else None


def _tile(label: str, before: str, value: str) -> Markup:
    number = element("dd", element("small", before) if before else None, value)
    return element("div", element("dt", label), number)


def _curves(run: RunData) -> list[Markup]:
    # What was measured once, as a held-out accuracy at the end, is a dot beside the curve that it belongs to.
    moving = [
        key for key, series in run.metrics.items() if not series.constant or len(series) == 1 < run.num_steps
    ]
    still = {key: series.last for key, series in run.metrics.items() if key not in moving}
    found: list[Markup] = []
    for group in charts_for(moving):
        charts = element("div", *_charts(run, group), class_="grid")
        hint = None if found else element("p", HINT, class_="hint")
        found.append(section(group.title, hint, charts, anchor=anchor(group.title)))
    shown = {
        key: value for key, value in still.items() if not key.startswith(("timing_s/", "training/", PREDICTED))
    }
    if shown:
        chips = [element("span", element("code", key), f" {short(value)}") for key, value in sorted(shown.items())]
        found.append(element("p", element("span", "The same at every step:"), *chips, class_="constant"))
    return found


def anchor(title: str) -> str:
    """A heading as the name that links point to."""
    return title.lower().replace(" ", "-")


def _charts(run: RunData, group: Group) -> list[Markup]:
    """The group's charts, without lines that repeat another, as the mean reward repeats its only source."""
    shown: list[Series] = []
    found = []
    for chart in group.charts:
        lines: list[Line] = []
        for key, label in chart.lines:
            series = run.series(key)
            if not any(same(series, other) for other in shown):
                lines.append(Line(label=label, series=series, slot=len(lines), exact=key in EXACT))
                shown.append(series)
        if lines:
            found.append(_chart(chart, lines))
    return found


def _chart(chart: Chart, lines: list[Line]) -> Markup:
    names = chart.lines[0][0] + (" \N{HORIZONTAL ELLIPSIS}" if len(lines) > 1 else "")
    return line_chart(Caption(title=chart.title, key=names, note=chart.note), lines)


def same(one: Series, other: Series) -> bool:
    """Whether one curve would cover the other."""
    return one.steps.tolist() == other.steps.tolist() and one.finite.tolist() == other.finite.tolist()


def _time(run: RunData) -> Markup | None:
    timeline = timeline_of(run)
    if timeline is None:
        return None
    table = element("div", time_table(timeline), class_="scroll", tabindex=0)
    body = element("div", timeline_chart(timeline), table, class_="beside")
    bars = bars_of(run)
    return section("Where the time goes", body, device_chart(bars) if bars else None, anchor="time")


def _completions(run: RunData) -> Markup | None:
    fixed, logged = fixed_table(run), logged_table(run)
    if fixed is None and logged is None:
        return None
    parts: list[Markup] = []
    if fixed is not None:
        parts += [element("h3", "The same prompts through training"), fixed]
    if logged is not None:
        parts += [element("h3", "Best and worst of the logged completions (different prompts each step)"), logged]
    return section("Completions", *parts, anchor="completions")


def batch_arithmetic(run: RunData) -> str:
    """Prompts to sequences to updates to micro-batches, in one line; empty without a config."""
    rows = int(run.number("data.batch_size"))
    if not rows:
        return ""
    budget = run.number("actor.max_tokens_per_micro_batch") or run.number("model.max_tokens_per_micro_batch")
    limit = f" \N{RIGHTWARDS ARROW} micro-batches of at most {budget:,.0f} tokens" if budget else ""
    updates = int(run.number(f"{run.method}.num_mini_batches"))
    if not updates:
        return f"{rows} rows a step \N{RIGHTWARDS ARROW} 1 update{limit}"
    copies = int(run.number("generation.num_generations", 1))
    epochs = int(run.number("ppo.num_ppo_epochs") or run.number(f"{run.method}.num_iterations", 1))
    return (
        f"{rows} prompts \N{MULTIPLICATION SIGN} {counted(copies, 'generation')} = {rows * copies} sequences a "
        f"step \N{RIGHTWARDS ARROW} {epochs} \N{MULTIPLICATION SIGN} {updates} updates of "
        f"{short(rows * copies / updates)} sequences{limit}"
    )


def _config(run: RunData) -> Markup | None:
    if not run.config:
        return None
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    arithmetic = batch_arithmetic(run)
    whole = element("details", element("summary", "config.yaml"), element("pre", text))
    batch = element("p", element("strong", "Batch "), arithmetic) if arithmetic else None
    return section("Configuration", batch, whole, anchor="config")


def _environment(run: RunData) -> Markup | None:
    if not run.environment:
        return None
    rows = [(str(key), str(value)) for key, value in run.environment.items() if value is not None]
    return section("Environment", key_values(rows), anchor="environment")


def _all_metrics(run: RunData) -> Markup | None:
    if not run.metrics:
        return None
    rows = [
        [key, *(short(v, 4) for v in (series.first, series.last, *_extremes(series)))]
        for key, series in sorted(run.metrics.items())
    ]
    table = number_table(["Metric", "First", "Last", "Lowest", "Highest"], rows)
    whole = element("details", element("summary", f"All {counted(len(rows), 'metric')}"), table)
    return section("Numbers", whole, anchor="numbers")


def _extremes(series: Series) -> tuple[float, float]:
    finite = series.finite
    return (float(finite.min()), float(finite.max())) if finite.size else (float("nan"), float("nan"))
