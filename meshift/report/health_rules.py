"""Rules for every run: whether it is whole, numbers that are none, gradient spikes, sampler against trainer.

Each is a pure function of what the run recorded. The thresholds are listed in docs/report.md too.
"""

from __future__ import annotations

import numpy as np

from meshift.report.diagnosis import MIN_STEPS, Diagnosis, Severity, long_enough, say, step_list
from meshift.report.numbers import counted, short
from meshift.report.run_data import RunData

SPIKE = 10.0
"""A gradient norm this many times the run's median is a spike."""
DRIFT_MEAN_NOTICE, DRIFT_MEAN_WARNING = 0.05, 0.2
"""Mean difference of log-probs between sampler and trainer, in nats. In bfloat16 some hundredths are rounding."""
DRIFT_MAX_NOTICE = 2.0
DRIFT_GROWTH, DRIFT_GROWTH_FLOOR = 3.0, 0.01
"""A difference that ends this many times above its beginning grows; below the floor, in nats, it is rounding."""

REWARDS, MODEL_REWARD, SCORED = "reward/", "reward/reward_model", ("reward/mean", "reward/std")
UNSCORED, GRADIENT, STOPPED = "objective/no_score_fraction", "grad_norm", "early_stop"


def completeness(run: RunData) -> Diagnosis | None:
    """A run that is not done, or whose files have lines that cannot be read."""
    planned = int(run.number("max_steps"))
    parts = []
    if run.num_steps == 0:
        parts.append("No step of this run is done yet.")
    elif run.num_steps < planned:
        parts.append(f"The run is at step {run.num_steps:,} of {planned:,}: it is still going, or was stopped.")
    elif not run.has_model:
        parts.append("The run's folder has no final model: it is still going, or was stopped.")
    if run.num_unreadable:
        parts.append(
            f"{counted(run.num_unreadable, 'line')} of metrics.jsonl and samples.jsonl could not be read; a run "
            "that is killed while it writes leaves one."
        )
    if not parts:
        return None
    return say("completeness", "notice", "The run is not complete", " ".join(parts))


def shortness(run: RunData) -> Diagnosis | None:
    """Too few steps for any rule that speaks of a trend."""
    if run.num_steps == 0 or any(long_enough(series) for series in run.metrics.values()):
        return None
    text = f"After {counted(run.num_steps, 'step')} there is no trend to judge; {MIN_STEPS} are needed."
    return say("shortness", "notice", "The run is short", text)


def not_finite(run: RunData) -> Diagnosis | None:
    """Metrics that were NaN or infinite at some step, though there was something to measure."""
    lost = {key: steps for key in run.metrics if (steps := lost_steps(run, key))}
    if not lost:
        return None
    worst = sorted(lost, key=lambda key: (lost[key][0], -len(lost[key])))
    named = "; ".join(f"{key} at {step_list(lost[key])}" for key in worst[:3])
    more = f"; and {counted(len(worst) - 3, 'more metric')}" if len(worst) > 3 else ""
    text = (
        f"Not a finite number: {named}{more}. Look at the step before the first of them; lower the learning "
        "rate, or set dtype=float32."
    )
    return say("not_finite", "warning", "NaN or infinity", text, *worst[:3])


def lost_steps(run: RunData, key: str) -> list[int]:
    """Steps at which a metric should have been a number, and was none.

    Nothing is lost where there was nothing to measure: rewards of completions that nothing scored, what a reward
    function had nothing to say of, and the gradient's norm of a step that was stopped before its first update.
    """
    lost = run.series(key).lost_steps
    if key in SCORED:
        return [step for step in lost if step not in _steps_of(run, UNSCORED)]
    if key.startswith(REWARDS) and key != MODEL_REWARD:
        return []
    if key.endswith(GRADIENT):
        return [step for step in lost if step not in _steps_of(run, f"{key.removesuffix(GRADIENT)}{STOPPED}")]
    return lost


def _steps_of(run: RunData, key: str) -> set[int]:
    """The steps at which a metric that is a part of something was all of it."""
    series = run.series(key)
    return {int(step) for step in series.steps[series.values == 1.0]}


def spikes(run: RunData) -> Diagnosis | None:
    """Gradient norms far above the run's median."""
    found = []
    for key, series in run.metrics.items():
        if key.endswith("grad_norm") and long_enough(series):
            high = series.values > SPIKE * float(np.median(series.finite))
            if high.any():
                found.append((key, [int(step) for step in series.steps[high]], float(np.nanmax(series.values))))
    if not found:
        return None
    named = "; ".join(f"{key} at {step_list(steps)} (up to {short(top)})" for key, steps, top in found)
    text = (
        f"More than {SPIKE:g} times its median: {named}. Single spikes are clipped away by max_grad_norm; many "
        "mean that the learning rate is too high, or that rows of the data are broken."
    )
    return say("spikes", "notice", "Gradient norm spikes", text, *(key for key, _, _ in found))


def drift(run: RunData) -> Diagnosis | None:
    """Sampler and trainer give the same tokens different log-probs."""
    mean, largest = run.series("sync/logprob_diff_mean"), run.series("sync/logprob_diff_max")
    key, series = ("sync/logprob_diff_mean", mean) if len(mean) else ("sync/logprob_diff_max", largest)
    if not long_enough(series):
        return None
    early, late = series.early, series.late
    figures = (
        f"The {'mean' if series is mean else 'largest'} difference between the sampler's and the trainer's "
        f"log-probs went from {short(early)} to {short(late)} nats"
    )
    if late > max(DRIFT_GROWTH * early, DRIFT_GROWTH_FLOOR):
        text = f"{figures}: it grows, so the sampler may be working with stale or otherwise different weights."
        return say("drift", "warning", "Sampler and trainer drift apart", text, key)
    high = late > (DRIFT_MEAN_NOTICE if series is mean else DRIFT_MAX_NOTICE)
    if not high:
        return say("drift", "good", "Sampler and trainer agree", f"{figures}.", key)
    severity: Severity = "warning" if series is mean and late > DRIFT_MEAN_WARNING else "notice"
    text = f"{figures}: importance ratios are off by as much before any update. Compare with dtype=float32."
    return say("drift", severity, "Sampler and trainer differ", text, key)
