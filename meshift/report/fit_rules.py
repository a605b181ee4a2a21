"""Rules for runs on given rows (sft, reward, dpo): loss, held-out loss, accuracy against chance.

Each is a pure function of what the run recorded. The thresholds are listed in docs/report.md too.
"""

from __future__ import annotations

import math

from meshift.report.diagnosis import Diagnosis, long_enough, say
from meshift.report.numbers import percent, short
from meshift.report.run_data import RunData
from meshift.report.series import Series

EVAL_FALL = 0.99
"""A held-out loss below this part of its first value has fallen, whatever the noise of the training loss."""
EVAL_RISE = 1.02
"""A held-out loss that ends this many times above its lowest has turned."""
CHANCE_ERRORS = 2.0
"""An accuracy within this many standard errors of one half is chance."""
ACCURACY_GAP = 0.15
"""Training accuracy this far above the held-out one."""
LOSS, EVAL_LOSS = "loss", "eval/loss"


def loss(run: RunData) -> Diagnosis | None:
    """Whether the training loss falls."""
    series = run.series(LOSS)
    if not long_enough(series):
        return None
    change = series.change()
    figures = f"from {short(change.early)} to {short(change.late)} (means of the first and the last fifth)"
    if change.fell:
        return say("loss", "good", "Loss falls", f"The loss went {figures}.", LOSS)
    if change.rose:
        text = f"The loss went {figures}. Lower the learning rate, and look for spikes of the gradient norm."
        return say("loss", "warning", "Loss rises", text, LOSS)
    held_out = run.series(EVAL_LOSS).finite
    if held_out.size > 1 and float(held_out[-1]) < EVAL_FALL * float(held_out[0]):
        text = (
            f"The held-out loss fell from {short(float(held_out[0]))} to {short(float(held_out[-1]))}; the "
            f"training loss, of other rows each step, went {figures}, no more than its noise."
        )
        return say("loss", "good", "Held-out loss falls", text, EVAL_LOSS, LOSS)
    text = f"The loss went {figures}, no more than its noise. Raise the learning rate, or train longer."
    return say("loss", "notice", "Loss does not move", text, LOSS)


def overfitting(run: RunData) -> Diagnosis | None:
    """Held-out loss up while the training loss goes down."""
    held_out, training = run.series(EVAL_LOSS), run.series(LOSS)
    values = held_out.finite
    if values.size < 3 or not long_enough(training):
        return None
    lowest = float(values.min())
    if not (training.late < training.early and held_out.last > EVAL_RISE * lowest > 0):
        return None
    step = int(held_out.steps[held_out.is_finite][values.argmin()])
    text = (
        f"The held-out loss was lowest at step {step} ({short(lowest)}) and ended at {short(held_out.last)}, "
        f"while the training loss went on falling to {short(training.late)}. Stop there, train fewer epochs, or "
        "lower the learning rate."
    )
    return say("overfitting", "warning", "The run overfits", text, EVAL_LOSS, LOSS)


def chance(run: RunData) -> Diagnosis | None:
    """Preference accuracy that a coin would reach, given how many pairs it was measured on."""
    key, series = _accuracy(run)
    if not long_enough(series):
        return None
    pairs = max(1, int(0.2 * series.finite.size)) * max(1.0, run.number("data.batch_size", 1.0))
    bound = 0.5 + CHANCE_ERRORS * 0.5 / math.sqrt(pairs)
    figures = f"Late in the run the model puts {percent(series.late)} of the training pairs in the right order"
    if series.late <= bound:
        text = (
            f"{figures}; up to {percent(bound)} could be chance. Check that chosen and rejected are not swapped "
            "or equal, raise the learning rate, or train longer."
        )
        return say("chance", "warning", "Accuracy is at chance", text, key)
    held_out = run.series("eval/accuracy")
    if held_out.finite.size:
        figures += f", and {percent(held_out.last)} of the held-out ones"
        if series.late - held_out.last > ACCURACY_GAP:
            text = f"{figures}: it learns pairs by heart. Use more pairs, fewer epochs or a lower learning rate."
            return say("chance", "warning", "Held-out accuracy stays behind", text, "eval/accuracy", key)
    return say("chance", "good", "Preferences are learned", f"{figures}.", key)


def _accuracy(run: RunData) -> tuple[str, Series]:
    keys = ("rewards/accuracies", "accuracy")
    return next(((key, run.series(key)) for key in keys if len(run.series(key))), (keys[0], run.series(keys[0])))


def displacement(run: RunData) -> Diagnosis | None:
    """DPO that widens the margin by making the chosen answers less likely too (Razin et al. 2024)."""
    chosen, margin = run.series("logps/chosen"), run.series("rewards/margins")
    if not (long_enough(chosen) and long_enough(margin)):
        return None
    fall, rise = chosen.change(), margin.change()
    if not (fall.fell and rise.rose):
        return None
    text = (
        f"The margin grows, but the log-probability of chosen answers fell from {short(fall.early)} to "
        f"{short(fall.late)}: both answers are being unlearned. Raise dpo.beta, lower the learning rate, or "
        "fine-tune on the chosen answers first."
    )
    return say("displacement", "notice", "Chosen answers become less likely", text, "logps/chosen")
