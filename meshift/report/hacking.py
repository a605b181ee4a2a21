"""Signs of reward hacking: reward goes up, while what it should stand for may not.

Lengths, the variety of the logged completions and KL tell; none of them proves it, so the sentence sends the
reader to the completions.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean

from meshift.report.diagnosis import MIN_STEPS, Diagnosis, Severity, long_enough, say
from meshift.report.numbers import short
from meshift.report.rl_rules import KL, KL_WARNING, LENGTH, kl_per_token
from meshift.report.run_data import RunData

LENGTH_FACTOR = 1.5
"""Completions this many times longer late in the run than early, or shorter."""
DISTINCT_FACTOR = 0.6
"""Late distinct-2 of the logged completions as a part of the early one."""


def hacking(run: RunData) -> Diagnosis | None:
    """Reward up, while what it should stand for may not be: lengths, variety and KL tell."""
    series = run.series("reward/mean")
    if not long_enough(series) or not series.change().rose:
        return None
    variety = _variety_sign(run)
    signs = [sign for sign in (_length_sign(run), variety, _kl_sign(run)) if sign]
    if not signs:
        return None
    change = series.change()
    text = (
        f"Reward rose from {short(change.early)} to {short(change.late)} while {' and '.join(signs)}. Read the "
        "completions below, and judge them by something that was not trained against."
    )
    metrics = ("reward/mean", LENGTH, KL)
    title = "Signs of reward hacking"
    severity: Severity = "warning" if len(signs) > 1 or variety else "notice"
    return say("hacking", severity, title, text, *metrics)


def _length_sign(run: RunData) -> str:
    lengths = run.series(LENGTH)
    if not long_enough(lengths):
        return ""
    change = lengths.change()
    if 0 < change.early * LENGTH_FACTOR < change.late or 0 < change.late * LENGTH_FACTOR < change.early:
        return f"completions went from {short(change.early)} to {short(change.late)} tokens"
    return ""


def _kl_sign(run: RunData) -> str:
    if not (long_enough(run.series(KL)) and long_enough(run.series(LENGTH))):
        return ""
    token = kl_per_token(run)
    return f"KL reached {short(token)} nats a token" if token > KL_WARNING else ""


def _variety_sign(run: RunData) -> str:
    """Distinct word pairs among a step's logged completions: the first fifth of the steps against the last."""
    texts: dict[int, list[str]] = {}
    for sample in run.samples:
        if not sample.fixed:
            texts.setdefault(sample.step, []).append(sample.completion)
    steps = sorted(texts)
    if len(steps) < MIN_STEPS:
        return ""
    count = max(1, len(steps) // 5)
    early = fmean(distinct_pairs(texts[step]) for step in steps[:count])
    late = fmean(distinct_pairs(texts[step]) for step in steps[-count:])
    if late >= DISTINCT_FACTOR * early:
        return ""
    return f"the variety of completions (distinct-2) fell from {short(early, 2)} to {short(late, 2)}"


def distinct_pairs(texts: Iterable[str]) -> float:
    """Distinct-2 (Li et al. 2016): the part of the neighbouring word pairs that are different; 1 without pairs."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for text in words for pair in pairwise(text)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0
