"""Which metrics share a chart, and how charts are grouped; metrics that are not listed get a chart under "More".

It knows names of metrics and nothing of runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

HIDDEN = ("timing_s/", "start_s/", "training/global_step", "perf/predicted_memory_gb/")
"""Shown by the timeline, the table of predictions, or the axis itself."""
BY_SOURCE = "Reward by source"
PEAKS = "perf/peak_memory_gb/"
EXACT = frozenset(
    ("lr", "actor/lr", "critic/lr", "objective/kl_coef", "cost/multiplier", "sync/version", "num_tokens")
)
"""Set, not measured: there is no noise to smooth away."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`lines` are (metric, label) pairs, the most important first."""

    title: str
    lines: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: tuple[Chart, ...]


def _one(title: str, key: str, note: str = "") -> Chart:
    return Chart(title=title, lines=((key, ""),), note=note)


def _held_out(title: str, key: str, *more: tuple[str, str], note: str = "") -> Chart:
    return Chart(title=title, lines=((key, "training"), *more, (f"eval/{key}", "held out")), note=note)


def groups() -> tuple[Group, ...]:
    """The groups in the order of the page."""
    return (_REWARD, _PREFERENCES, _LOSS, _POLICY, _VALUE, _LENGTHS, _SPEED)


_REWARD = Group(
    title="Reward and KL",
    charts=(
        Chart(title="Reward", lines=(("reward/mean", "score"), ("objective/rlhf_reward", "less KL penalty"))),
        _one("KL to the reference", "objective/kl", "nats per completion"),
        Chart(
            title="Spread of rewards",
            lines=(("reward/std", "of all"), ("reward/group_std", "in a group")),
            note="standard deviation",
        ),
        _one("Groups of equal rewards", "reward/frac_reward_zero_std", "part of the groups"),
        _one("Price of overlong completions", "reward/overlong_penalty", "mean"),
        _one("Reward above the greedy completion's", "reward/over_greedy", "mean"),
        _one("KL coefficient", "objective/kl_coef"),
        _one("Completions without a score", "objective/no_score_fraction", "part of the batch"),
    ),
)
_PREFERENCES = Group(
    title="Preferences",
    charts=(
        Chart(
            title="Accuracy",
            lines=(
                ("accuracy", "training"),
                ("rewards/accuracies", "training"),
                ("eval/accuracy", "held out"),
                ("eval/rewards/accuracies", "held out"),
            ),
            note="pairs in the right order",
        ),
        Chart(
            title="Margin",
            lines=(
                ("margin", "training"),
                ("rewards/margins", "training"),
                ("eval/margin", "held out"),
                ("eval/rewards/margins", "held out"),
            ),
            note="chosen less rejected",
        ),
        Chart(title="Rewards", lines=(("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
        Chart(
            title="Log-probabilities",
            lines=(("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
            note="nats per answer",
        ),
    ),
)
_LOSS = Group(
    title="Loss",
    charts=(
        _held_out("Loss", "loss"),
        _held_out("Token accuracy", "mean_token_accuracy"),
        _one("Held-out perplexity", "eval/perplexity"),
        _one("Gradient norm", "grad_norm", "before clipping"),
        _one("Learning rate", "lr"),
        _one("Tokens trained on", "num_tokens"),
    ),
)
_POLICY = Group(
    title="Policy",
    charts=(
        _one("Policy loss", "actor/pg_loss"),
        _one("Entropy", "actor/entropy", "nats per token"),
        _one("Clip fraction", "actor/pg_clipfrac", "part of the tokens"),
        _one("KL of an update", "actor/ppo_kl", "nats per token"),
        _one("Gradient norm of the actor", "actor/grad_norm", "before clipping"),
        _one("Updates stopped early", "actor/early_stop", "part of the steps"),
        Chart(
            title="Sampler against trainer",
            lines=(("sync/logprob_diff_mean", "mean"), ("sync/logprob_diff_max", "largest")),
            note="difference of log-probs, nats",
        ),
        Chart(
            title="Staleness",
            lines=(("off_policy/staleness_mean", "mean"), ("off_policy/staleness_max", "largest")),
            note="steps whose updates the weights that drew the tokens lack",
        ),
        Chart(
            title="Importance weights",
            lines=(
                ("off_policy/ratio_mean", "mean ratio"),
                ("off_policy/ess", "effective sample size"),
                ("off_policy/truncated_fraction", "truncated"),
            ),
            note="of tokens that older weights drew",
        ),
        _one("Layout of sampling against layout of training", "sync/probe_diff_max", "log-probs of a few tokens"),
        Chart(title="Learning rates", lines=(("actor/lr", "actor"), ("critic/lr", "critic"))),
    ),
)
_VALUE = Group(
    title="Value function",
    charts=(
        _one("Explained variance", "critic/vf_explained_var", "of the returns"),
        _one("Value loss", "critic/vf_loss"),
        Chart(
            title="Values and returns",
            lines=(("critic/values/mean", "values"), ("critic/returns/mean", "returns")),
        ),
        _one("Advantages", "critic/advantages/mean", "mean, before whitening"),
        _one("Clip fraction of values", "critic/vf_clipfrac", "part of the tokens"),
        _one("Gradient norm of the critic", "critic/grad_norm", "before clipping"),
    ),
)
_LENGTHS = Group(
    title="Lengths",
    charts=(
        Chart(
            title="Completion length",
            lines=(
                ("response_length/mean", "mean"),
                ("response_length/max", "longest"),
                ("response_length/min", "shortest"),
            ),
            note="tokens",
        ),
        _one("Completions cut off", "response_length/clip_ratio", "part of the batch"),
    ),
)
_SPEED = Group(
    title="Speed and memory",
    charts=(
        _one("Time per step", "perf/time_per_step", "seconds"),
        _one("Throughput", "perf/tokens_per_s", "trained tokens per second"),
        _one("Generated tokens", "perf/generated_tokens", "per step"),
        _one("Model FLOP utilisation", "perf/mfu"),
        _one("Weight synchronisation", "sync/seconds", "seconds"),
        _one("Bytes synchronised", "sync/bytes"),
        _one("Version of the weights", "sync/version", "optimizer updates"),
    ),
)


def charts_for(keys: Iterable[str]) -> list[Group]:
    """The groups and charts for which there is a metric, with the lines for which there is one."""
    left = {key for key in keys if not key.startswith(HIDDEN)}
    found = []
    for group in groups():
        charts = [kept for chart in group.charts if (kept := _with_lines(chart, left)).lines]
        left -= {key for chart in charts for key, _ in chart.lines}
        if group is _REWARD:
            sources = _sources(left)
            left -= set(sources)
            charts += [_by_source(sources)] if sources else []
        if group is _SPEED:
            peaks = sorted(key for key in left if key.startswith(PEAKS))
            left -= set(peaks)
            charts += [_peaks(peaks)] if peaks else []
        if charts:
            found.append(Group(title=group.title, charts=tuple(charts)))
    more = tuple(_one(key, key) for key in sorted(left))
    return found + ([Group(title="More", charts=more)] if more else [])


def _with_lines(chart: Chart, keys: set[str]) -> Chart:
    return replace(chart, lines=tuple(line for line in chart.lines if line[0] in keys))


def _peaks(keys: list[str]) -> Chart:
    lines = tuple((key, key.removeprefix(PEAKS)) for key in keys)
    return Chart(title="Peak of memory in each call", lines=lines, note="GB, of the call's first process")


def _sources(keys: Iterable[str]) -> list[str]:
    """`reward/<source>`; what a source logs besides, as `reward/<source>/num_errors`, is no reward."""
    found: list[str] = []
    for key in sorted(key for key in keys if key.startswith("reward/")):
        if not any(key.startswith(f"{source}/") for source in found):
            found.append(key)
    return found


def _by_source(keys: list[str]) -> Chart:
    return Chart(title=BY_SOURCE, lines=tuple((key, key.removeprefix("reward/")) for key in keys))
