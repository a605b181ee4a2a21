"""Rules for runs that generate: reward, KL, entropy, truncation, the value function, clipping.

Each is a pure function of what the run recorded. The thresholds are conventions of the field, not laws; each
stands beside its reason here and in docs/report.md.
"""

from __future__ import annotations

from meshift.config.sections import PPOConfig
from meshift.report.diagnosis import Diagnosis, Severity, long_enough, say
from meshift.report.numbers import percent, short
from meshift.report.run_data import RunData

KL, LENGTH, TRUNCATED = "objective/kl", "response_length/mean", "response_length/clip_ratio"
KL_NOTICE, KL_WARNING = 0.3, 1.0
"""Nats per token to the reference, late in the run. At 1 the reference gives the actor's tokens on average e times
less probability than the actor does."""
KL_GROWTH = 2.0
"""A late KL this many times that of the run's middle, and above the floor below, is still accelerating."""
KL_GROWTH_FLOOR = 0.05
KL_NEGATIVE = -0.05
"""KL is never negative; its estimate per token falls below this only if the two distributions differ otherwise."""
KL_TARGET_FACTOR = 2.0
"""With adaptive_kl: a late KL above this many times kl_target is one that the controller does not hold."""
ENTROPY_NOTICE, ENTROPY_WARNING, ENTROPY_FLOOR = 0.5, 0.25, 0.05
"""Late entropy as a part of the early one; below the floor (nats a token) next to nothing is drawn by chance."""
TRUNCATED_NOTICE, TRUNCATED_WARNING = 0.1, 0.5
VALUE_NOTICE, VALUE_WARNING = 0.2, 0.0
CLIP_NOTICE, CLIP_WARNING = 0.2, 0.4
EARLY_STOP_NOTICE, EARLY_STOP_WARNING = 0.2, 0.5
REWARD_STD_FACTOR = 0.1
NO_SCORE = 0.2


def reward(run: RunData) -> Diagnosis | None:
    """Whether the mean score rose, fell, or did neither."""
    series = run.series("reward/mean")
    if not long_enough(series):
        return None
    change = series.change()
    figures = f"from {short(change.early)} to {short(change.late)} (means of the first and the last fifth)"
    if change.rose:
        return say("reward", "good", "Reward rises", f"The mean reward went {figures}.", "reward/mean")
    if change.fell:
        text = (
            f"The mean reward went {figures}. Lower the learning rate; look at the gradient norms, and at whether "
            "the value function explains anything."
        )
        return say("reward", "warning", "Reward falls", text, "reward/mean")
    text = (
        f"The mean reward went {figures}, no more than its noise. Train longer, raise the learning rate, or lower "
        "the KL penalty; check that completions of one prompt get different rewards."
    )
    return say("reward", "notice", "Reward does not move", text, "reward/mean")


def kl_per_token(run: RunData, start: float = 0.8, stop: float = 1.0) -> float:
    """Mean KL to the reference over a part of the run, in nats per token. NaN without lengths."""
    return run.series(KL).part(start, stop) / max(run.series(LENGTH).part(start, stop), 1.0)


def kl(run: RunData) -> Diagnosis | None:
    """KL to the reference: negative, out of its controller's hand, too high, or accelerating."""
    if not (long_enough(run.series(KL)) and long_enough(run.series(LENGTH))):
        return None
    late, token = run.series(KL).late, kl_per_token(run)
    figures = f"KL to the reference ended at {short(late)} nats a completion, {short(token)} a token"
    if token < KL_NEGATIVE:
        text = (
            f"{figures}; a KL cannot be negative. Sampler and reference measure different distributions: compare "
            "temperature, top-k, top-p and the compute type."
        )
        return say("kl", "warning", "KL is negative", text, KL)
    return _kl_budget(run, figures, token) or _kl_growth(run, figures, token)


def _kl_budget(run: RunData, figures: str, token: float) -> Diagnosis | None:
    remedy = _either(run, ("raise", "kl_coef"), "lower the learning rate")
    remedy = f"Read the completions; if they have become worse, {remedy}."
    if run.setting("ppo.adaptive_kl", False):
        target = run.number("ppo.kl_target", 6.0)
        unit = run.setting("ppo.kl_target_unit", "sequence")
        reached = token if unit == "token" else run.series(KL).late
        if reached > KL_TARGET_FACTOR * target:
            text = f"{figures}, against a target of {short(target)} a {unit}: the controller does not hold it. "
            return say("kl", "warning", "KL is above its target", text + "Shorten ppo.kl_horizon.", KL)
    if token > KL_WARNING:
        return say("kl", "warning", "KL is very high", f"{figures}. {remedy}", KL)
    if token > KL_NOTICE:
        return say("kl", "notice", "KL is high", f"{figures}. {remedy}", KL)
    return None


def _kl_growth(run: RunData, figures: str, token: float) -> Diagnosis:
    middle = kl_per_token(run, 0.4, 0.6)
    if token > KL_GROWTH_FLOOR and token > KL_GROWTH * middle:
        remedy = _either(run, ("raise", "kl_coef"), ("set", "adaptive_kl"), "lower the learning rate")
        text = (
            f"{figures}, {short(token / max(middle, 1e-9), 2)} times that of the run's middle. If it goes on so, "
            f"it leaves the reference soon: {remedy}."
        )
        return say("kl", "warning", "KL rises ever faster", text, KL)
    return say("kl", "good", "KL is moderate", f"{figures}.", KL)


def entropy(run: RunData) -> Diagnosis | None:
    """Whether the policy still explores."""
    series = run.series("actor/entropy")
    if not long_enough(series):
        return None
    early, late = series.early, series.late
    figures = f"Entropy went from {short(early)} to {short(late)} nats a token"
    if late < ENTROPY_WARNING * early or late < ENTROPY_FLOOR:
        remedy = _either(run, ("raise", "kl_coef"), ("set", "entropy_coef"), "lower the learning rate")
        text = (
            f"{figures}. The policy hardly explores any more, and completions of one prompt are near copies: "
            f"{remedy}."
        )
        return say("entropy", "warning", "Entropy has collapsed", text, "actor/entropy")
    if late < ENTROPY_NOTICE * early:
        text = f"{figures}. Watch whether completions begin to repeat each other."
        return say("entropy", "notice", "Entropy falls", text, "actor/entropy")
    return say("entropy", "good", "Entropy holds", f"{figures}.", "actor/entropy")


def truncation(run: RunData) -> Diagnosis | None:
    """Completions that ran into the length limit, unless the limit is where the task ends."""
    series = run.series(TRUNCATED)
    limit = run.number("generation.max_completion_length")
    meant = run.setting("ppo.length_limit_is_end", False) or run.number("generation.min_new_tokens") == limit > 0
    if not series.finite.size or meant:
        return None
    late = series.late
    figures = f"Late in the run {percent(late)} of the completions ran into the length limit"
    if late <= TRUNCATED_NOTICE:
        return say("truncation", "good", "Few completions are cut off", f"{figures}.", TRUNCATED)
    remedy = _either(run, "raise generation.max_completion_length", ("set", "missing_eos_penalty"))
    text = (
        f"{figures}{f' of {short(limit)} tokens' if limit else ''}, so their reward is of an unfinished text: "
        f"{remedy}."
    )
    severity: Severity = "warning" if late > TRUNCATED_WARNING else "notice"
    title = "Most completions are cut off" if late > TRUNCATED_WARNING else "Many completions are cut off"
    return say("truncation", severity, title, text, TRUNCATED)


def value_function(run: RunData) -> Diagnosis | None:
    """Whether the critic predicts anything of the returns."""
    key = "critic/vf_explained_var"
    series = run.series(key)
    if not long_enough(series):
        return None
    late = series.late
    if late <= VALUE_WARNING:
        text = (
            f"Late in the run the returns' explained variance is {short(late)}: a constant would do as well, "
            "and advantages are as noisy as without a critic. Raise critic.learning_rate, start the critic from "
            "the reward model, or set ppo.value_norm."
        )
        return say("value_function", "warning", "The value function explains nothing", text, key)
    text = f"Late in the run the critic explains {percent(late)} of the variance of the returns."
    if late < VALUE_NOTICE:
        text += " More would make advantages less noisy: try a higher critic.learning_rate."
        return say("value_function", "notice", "The value function explains little", text, key)
    return say("value_function", "good", "The value function explains returns", text, key)


def clipping(run: RunData) -> Diagnosis | None:
    """Updates so large that much of the batch is clipped away."""
    series = run.series("actor/pg_clipfrac")
    if not long_enough(series) or series.late <= CLIP_NOTICE:
        return None
    severity: Severity = "warning" if series.late > CLIP_WARNING else "notice"
    fewer = _either(run, ("lower", "num_ppo_epochs"), ("lower", "num_iterations"), ("lower", "num_mini_batches"))
    text = (
        f"Late in the run the clip acts on {percent(series.late)} of the tokens: updates move the policy further "
        f"than the objective can use. Lower actor.learning_rate, or make fewer updates a step ({fewer})."
    )
    metrics = ("actor/pg_clipfrac", "actor/ppo_kl")
    title = "Much of the batch is clipped"
    return say("clipping", severity, title, text, *metrics)


def early_stops(run: RunData) -> Diagnosis | None:
    """Steps whose updates were ended by the importance ratio or the KL limit."""
    series = run.series("actor/early_stop")
    share = float(series.finite.mean()) if series.finite.size else 0.0
    if share <= EARLY_STOP_NOTICE:
        return None
    severity: Severity = "warning" if share > EARLY_STOP_WARNING else "notice"
    limits = _either(run, ("", "max_importance_ratio"), ("", "max_update_kl"))
    text = (
        f"In {percent(share)} of the steps updates were ended before the last, by {limits}, and part of the batch "
        "was not used. Lower actor.learning_rate."
    )
    title = "Updates are often stopped early"
    return say("early_stops", severity, title, text, "actor/early_stop")


def no_signal(run: RunData) -> Diagnosis | None:
    """All completions get about the same reward, or many get none."""
    lost = run.series("objective/no_score_fraction")
    if lost.finite.size and lost.late > NO_SCORE:
        text = (
            f"Late in the run {percent(lost.late)} of the completions got no score, as they were cut off or their "
            "reward function failed."
        )
        return say("no_signal", "notice", "Many completions get no score", text, "objective/no_score_fraction")
    spread = run.series("reward/std")
    if not long_enough(spread) or spread.late >= REWARD_STD_FACTOR * spread.early:
        return None
    text = (
        f"The standard deviation of rewards went from {short(spread.early)} to {short(spread.late)}: there is "
        "next to nothing left to learn from. The task may be solved, or one trick found that always pays."
    )
    return say("no_signal", "notice", "Rewards no longer differ", text, "reward/std")


def _either(run: RunData, *remedies: str | tuple[str, str]) -> str:
    """Remedies joined by "or". A pair is a verb and a key of the objective, left out where the method has none."""
    section = run.method or "ppo"
    known = run.setting(section) or PPOConfig.model_fields
    texts = []
    for remedy in remedies:
        if isinstance(remedy, str):
            texts.append(remedy)
        elif remedy[1] in known:
            texts.append(f"{remedy[0]} {section}.{remedy[1]}".lstrip())
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
