"""What the paper says, what came out here, and whether the direction is the same.

A direction counts as the paper's where the whole 95 % interval lies on its side of zero, as the opposite where the
whole interval lies on the other side, and else as open; `beside` is what the paper does not ask. Intervals are
over training seeds; how another seed would end nobody knows of one, so its verdict says that it is one seed's.
Nothing here knows how anything was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from recipes.study.intervals import Mean, difference, mean_of

Verdict = Literal["agrees", "contradicts", "open", "beside", "one seed agrees", "one seed contradicts"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim of the paper and its fate; `figures` are words with the numbers."""

    claim: str
    figures: str
    verdict: Verdict


def direction(found: Mean) -> Verdict:
    """Of a difference that the paper has above zero."""
    if found.low > 0:
        return "agrees"
    return "contradicts" if found.high < 0 else "open"


def of_one_seed(verdict: Verdict) -> Verdict:
    """The verdict of an interval over prompts."""
    names: dict[Verdict, Verdict] = {"agrees": "one seed agrees", "contradicts": "one seed contradicts"}
    return names.get(verdict, verdict)


def in_words(found: Mean, digits: int = 3) -> str:
    """`0.120 (0.080 to 0.160)`; without an interval where there is one number."""
    if found.count < 2:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def theory_findings(theory: Mapping[str, Any], shown: Sequence[float]) -> list[Finding]:
    """Of the counter-example, and of the 8 x 8 scenario at the cell that is shown."""
    actions = theory["three_actions"]
    biased = next(row for row in actions["dpo_losses"] if row["policy"][2] == 0.9)
    optima = [row["optimum"][2] for row in actions["ppo"]]
    unseen = [row["reward"][2] for row in actions["ppo"]]
    reached = max(row["dpo"][2] for row in actions["starts"])
    cell = cell_of(theory, shown)
    rise = {name: mean_of(figures(cell, name, "largest_rise")) for name in ("dpo", "ppo", "optimum")}
    less = difference(figures(cell, "dpo", "largest_rise"), figures(cell, "ppo", "largest_rise"))
    wrong = mean_of([seed["reward_above_right"] for seed in cell["seeds"]])
    away = mean_of([seed["ppo_to_optimum"] for seed in cell["seeds"]])
    return [
        Finding(
            claim="Three actions: DPO's loss is least at (.1, 0, .9), though nobody ever saw the third",
            figures=f"loss {biased['loss']:.1e}, where 0 is the least",
            verdict="agrees" if biased["loss"] < 1e-6 else "contradicts",
        ),
        Finding(
            claim="PPO's optimum gives the third action nothing, whatever the reward model says of it",
            figures=f"probability {max(optima):.0e} at rewards from {min(unseen):g} to {max(unseen):g}",
            verdict="agrees" if max(optima) == 0 else "contradicts",
        ),
        Finding(
            claim="Does descent on DPO's loss end at such a policy, where each action has a logit of its own?",
            figures=f"From {len(actions['starts'])} starts, with up to .9 on the third, it ends with at most "
            f"{reached:.0e} there",
            verdict="beside",
        ),
        Finding(
            claim=f"{_grid_words(cell)}: DPO raises an uncovered response",
            figures=f"largest rise of a prompt's uncovered responses, mean over prompts: {in_words(rise['dpo'])}",
            verdict=direction(rise["dpo"]),
        ),
        Finding(
            claim="The optimum of PPO's objective does not raise it",
            figures=f"{in_words(rise['optimum'])}, computed exactly",
            verdict=direction(_negative(rise["optimum"])),
        ),
        Finding(
            claim="PPO, trained for as many updates as DPO, does not raise it",
            figures=f"{in_words(rise['ppo'])}; it is {in_words(away, 2)} nats from that optimum",
            verdict=direction(_negative(rise["ppo"])),
        ),
        Finding(
            claim="PPO so trained raises uncovered responses less than DPO",
            figures=f"DPO's largest rise less PPO's, seed by seed: {in_words(less)}",
            verdict=direction(less),
        ),
        Finding(
            claim="The reward model is wrong about uncovered responses too",
            figures=f"share of prompts where it puts one above the right response: {in_words(wrong)}",
            verdict=direction(wrong),
        ),
    ]


def _negative(found: Mean) -> Mean:
    return Mean(value=-found.value, low=-found.high, high=-found.low, count=found.count)


def _grid_words(cell: Mapping[str, Any]) -> str:
    return f"8 x 8, {cell['setting']['pairs_per_prompt']} pairs a prompt, beta {cell['setting']['beta']:g}"


def cell_of(theory: Mapping[str, Any], shown: Sequence[float]) -> Mapping[str, Any]:
    """The cell with these pairs per prompt and this beta; the first where there is none."""
    for cell in theory["cells"]:
        if (cell["setting"]["pairs_per_prompt"], cell["setting"]["beta"]) == tuple(shown):
            return cell
    return theory["cells"][0]


def figures(cell: Mapping[str, Any], method: str, figure: str) -> list[float]:
    """One number a seed."""
    return [seed[method][figure] for seed in cell["seeds"]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One point of a frontier: its runs of all seeds, and per held-out prompt the means over these."""

    method: str
    strength: float | None
    runs: Sequence[Mapping[str, Any]]

    def per_prompt(self, what: str) -> list[float]:
        """Of `true`, `proxy` or `kl`: a number a prompt, the mean over seeds."""
        return [fmean(numbers) for numbers in zip(*(run[what] for run in self.runs), strict=True)]

    def mean(self, what: str) -> Mean:
        """Over seeds where there are several, else over prompts."""
        if len(self.runs) > 1:
            return mean_of([fmean(run[what]) for run in self.runs])
        return mean_of(self.per_prompt(what))


COMPARED = (
    ("ppo", "dpo", "PPO reaches a higher true reward than DPO"),
    ("online_dpo", "dpo", "Iterative DPO reaches a higher true reward than DPO"),
    ("ppo", "online_dpo", "PPO reaches a higher true reward than iterative DPO"),
    ("dpo_after_sft", "dpo", "DPO after SFT on the chosen answers reaches a higher true reward than DPO"),
    ("dpo", "sft", "DPO reaches a higher true reward than SFT"),
)


def sentiment_findings(places: Sequence[Place]) -> list[Finding]:
    """The best of each method's sweep against another's, seed by seed, or prompt by prompt where there is one."""
    best = {method: best_of(places, method) for method in {place.method for place in places}}
    found = []
    for better, worse, claim in COMPARED:
        if better in best and worse in best:
            one, other = best[better], best[worse]
            gain, over = gain_of(one, other)
            figures = (
                f"{in_words(one.mean('true'))} at KL {one.mean('kl').value:.1f} against "
                f"{in_words(other.mean('true'))} at KL {other.mean('kl').value:.1f}; difference "
                f"over {over} {in_words(gain)}{_no_further(places, one, other)}"
            )
            verdict = direction(gain)
            found.append(
                Finding(claim=claim, figures=figures, verdict=verdict if over == "seeds" else of_one_seed(verdict))
            )
    return found


def gain_of(one: Place, other: Place) -> tuple[Mean, str]:
    """The true reward of one place less another's, and what the interval is over: seeds, or the prompts of one."""
    if len(one.runs) > 1:
        pairs = ([fmean(run["true"]) for run in place.runs] for place in (one, other))
        return difference(*pairs), "seeds"
    return difference(one.per_prompt("true"), other.per_prompt("true")), "prompts"


def _no_further(places: Sequence[Place], one: Place, other: Place) -> str:
    """What the first method reaches with at most the other's KL, where its best point went further."""
    limit = other.mean("kl").value
    if one.mean("kl").value <= limit:
        return ""
    near = [place for place in places if place.method == one.method and place.mean("kl").value <= limit]
    if not near:
        return f"; none of its points has a KL of at most {limit:.1f}"
    place = best_of(near, one.method)
    return f"; with at most that KL it reaches {in_words(place.mean('true'))} (at {place.mean('kl').value:.1f})"


def best_of(places: Sequence[Place], method: str) -> Place:
    """By true reward; chosen on the prompts on which it is then reported."""
    return max((place for place in places if place.method == method), key=lambda place: place.mean("true").value)


def ablation_findings(runs: Sequence[tuple[Mapping[str, bool], Mapping[str, Any]]]) -> list[Finding]:
    """Each factor's main effect: over pairs of runs that differ in it alone, so that runs count, not prompts."""
    found = []
    for factor in runs[0][0] if runs else ():
        sides = {
            on: [fmean(run["true"]) for factors, run in runs if factors[factor] == on] for on in (True, False)
        }
        if len(sides[True]) != len(sides[False]):
            continue  # a study that is not finished
        gain = difference(sides[True], sides[False])
        found.append(
            Finding(
                claim=f"PPO: {factor} raises the true reward",
                figures=f"{fmean(sides[True]):.3f} with, {fmean(sides[False]):.3f} without; difference over "
                f"{gain.count} pairs of runs that differ in nothing else {in_words(gain)}",
                verdict=direction(gain),
            )
        )
    return found
