"""The report's sections on the language model: the frontiers, every point, some completions, and the ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from meshift.report.document import number_table, section
from meshift.report.interval_chart import Mark, Track, interval_chart
from meshift.report.line_chart import Caption
from meshift.report.markup import Markup, element
from meshift.report.numbers import duration
from recipes.study.findings import Place, best_of, in_words
from recipes.study.points import METHODS, points_of
from recipes.study.setting import SentimentSetting
from recipes.study.theory_sections import span

SLOTS = {"reference": 6, "sft": 4, "dpo": 1, "dpo_after_sft": 3, "online_dpo": 2, "ppo": 0}
NUM_TEXTS = 3
Results = Mapping[str, Mapping[str, Any]]
Ablated = Sequence[tuple[Mapping[str, bool], Mapping[str, Any]]]


def places_of(setting: SentimentSetting, results: Results) -> list[Place]:
    """The judged points of the sweeps, all seeds of a strength together; of whole places only."""
    groups: dict[tuple[str, float | None], list[str]] = {}
    for point in points_of(setting):
        if point.is_policy and not point.factors:
            groups.setdefault((point.method, point.strength), []).append(point.name)
    return [
        Place(method=method, strength=strength, runs=[results[name] for name in names])
        for (method, strength), names in groups.items()
        if all(name in results for name in names)
    ]


def ablated_of(setting: SentimentSetting, results: Results) -> Ablated:
    """The ablation's runs with what was on in each."""
    points = [point for point in points_of(setting) if point.factors and point.name in results]
    return [(point.factors, results[point.name]) for point in points]


def frontier_section(setting: SentimentSetting, results: Results, places: Sequence[Place]) -> Markup:
    """Reward against KL, by the true reward and by the reward model; every point as a row; completions."""
    accuracy = [
        result["metrics"]["eval/accuracy"] for name, result in results.items() if name.startswith("reward_seed")
    ]
    learned = f"; its held-out accuracy is {fmean(accuracy):.3f}" if accuracy else ""
    over = "seeds" if len(setting.seeds) > 1 else "held-out prompts (there is one training seed)"
    words = (
        "SmolLM2-135M-Instruct continues the openings of film reviews. The true reward is VADER's sentiment of "
        "the completion. The reference is the model after fine-tuning on reviews of both kinds; preferences are "
        f"between best and worst of {setting.pairs.num_completions} of its completions, by true reward. "
        "DPO and SFT learn from these, as does the reward model "
        f"that PPO and iterative DPO are rewarded by{learned}. {setting.num_heldout_prompts} held-out openings, "
        f"{setting.completion_length} tokens at temperature 1; KL in nats a completion, to the one reference, on "
        f"the policy's own completions. Intervals: 95 %, over {over}."
    )
    charts = [_frontier(places, "true", "True reward")]
    if all(run["proxy"] for place in places for run in place.runs if place.method != "reference"):
        charts.append(_frontier([p for p in places if p.method != "reference"], "proxy", "Reward model"))
    head = ["method, strength", "true reward", "KL", "reward model", "distinct-2", "training"]
    return section(
        "A language model: reward against KL",
        element("p", words, class_="hint"),
        element("div", *charts, class_="halves"),
        number_table(head, [_row(place) for place in places]),
        element("h3", "Completions of the best point of each method"),
        _texts(places),
        anchor="frontier",
    )


def _frontier(places: Sequence[Place], what: str, title: str) -> Markup:
    tracks = []
    for method in dict.fromkeys(place.method for place in places):
        own = sorted((p for p in places if p.method == method), key=lambda place: place.strength or 0.0)
        marks = [Mark(x=span(place.mean("kl")), y=span(place.mean(what)), name=_strength(place)) for place in own]
        tracks.append(Track(label=METHODS[method].title, slot=SLOTS[method], marks=marks))
    caption = Caption(title=f"{title} against KL", key=title.lower(), note="joined in the order of the strength")
    return interval_chart(caption, tracks, "KL to the reference, nats a completion", height=380)


def _strength(place: Place) -> str:
    key = METHODS[place.method].strength
    return "" if place.strength is None else f"{key.rsplit('.', 1)[-1]} {place.strength:g}"


def _row(place: Place) -> list[str]:
    proxy = in_words(place.mean("proxy"), 2) if all(run["proxy"] for run in place.runs) else ""
    return [
        f"{METHODS[place.method].title} {_strength(place)}".strip(),
        in_words(place.mean("true")),
        in_words(place.mean("kl"), 2),
        proxy,
        f"{fmean(run['distinct2'] for run in place.runs):.3f}",
        duration(fmean(run["train_seconds"] for run in place.runs)),
    ]


def _texts(places: Sequence[Place]) -> Markup:
    best = [best_of(places, method) for method in dict.fromkeys(place.method for place in places)]
    head = ["opening", *(f"{METHODS[p.method].title} {_strength(p)}".strip() for p in best)]
    opened = best[0].runs[0]["texts"][:NUM_TEXTS]
    rows = [[opening, *(place.runs[0]["texts"][i][1] for place in best)] for i, (opening, _) in enumerate(opened)]
    return number_table(head, rows, numbers=False)


def ablation_section(setting: SentimentSetting, ablated: Ablated) -> Markup:
    """All combinations as a table and a chart."""
    factors = list(ablated[0][0])
    rows, tracks = [], []
    merged: dict[tuple[bool, ...], list[Mapping[str, Any]]] = {}
    for is_on, run in ablated:
        merged.setdefault(tuple(is_on.values()), []).append(run)
    for i, (on, runs) in enumerate(merged.items()):
        place = Place(method="ppo", strength=None, runs=runs)
        label = ", ".join(name for name, used in zip(factors, on, strict=True) if used) or "none of them"
        rows.append(
            [label, in_words(place.mean("true")), in_words(place.mean("kl"), 2), in_words(place.mean("proxy"), 2)]
        )
        mark = Mark(x=span(place.mean("kl")), y=span(place.mean("true")), name=label)
        tracks.append(Track(label=label, slot=i % 8, marks=[mark]))
    ablation = setting.ablation
    words = (
        f"As many completions in all with either batch: {', '.join(ablation.small_batch)} against "
        f"{', '.join(ablation.large_batch)}; each step in 4 mini-batches. Moving reference at "
        f"{ablation.small_ema_rate:g} and {ablation.large_ema_rate:g} a step. {', '.join(ablation.overrides)}."
        if ablation is not None
        else ""
    )
    caption = Caption(title="True reward against KL", key="true reward")
    return section(
        "PPO: batch size, advantage normalisation, reference EMA",
        element("p", words, class_="hint"),
        element(
            "div",
            number_table(["with", "true reward", "KL", "reward model"], rows),
            interval_chart(caption, tracks, "KL to the reference, nats a completion"),
            class_="halves",
        ),
        anchor="ablation",
    )
