"""The points of the sentiment study: which runs there are, what each starts from, and their configs.

It knows nothing of how they are run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from meshift.config.loading import load_config
from meshift.config.policy_runs import OnlineDPORunConfig
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, RunConfig, SFTRunConfig
from meshift.runtime.dpo_run import run_dpo
from meshift.runtime.policy_run import run_policy
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.reward_run import run_reward
from meshift.runtime.sft_run import run_sft
from recipes.study.setting import AblationSetting, SentimentSetting

RUNS = Path(__file__).parent / "runs"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training command: its config, the study's recipe for it, and the key that is its strength."""

    title: str
    schema: type[RunConfig]
    recipe: str
    run: Callable[..., Any]
    strength: str = ""
    rolls_out: bool = False

    @property
    def model(self) -> str:
        """The section of what is trained."""
        return "model" if self.schema in (SFTRunConfig, RewardRunConfig) else "actor"


METHODS = {
    "reference": Method(title="reference", schema=SFTRunConfig, recipe="reference.yaml", run=run_sft),
    "reward": Method(title="reward model", schema=RewardRunConfig, recipe="reward.yaml", run=run_reward),
    "sft": Method(title="SFT", schema=SFTRunConfig, recipe="sft.yaml", run=run_sft, strength="max_steps"),
    "dpo": Method(title="DPO", schema=DPORunConfig, recipe="dpo.yaml", run=run_dpo, strength="dpo.beta"),
    "dpo_after_sft": Method(
        title="DPO after SFT", schema=DPORunConfig, recipe="dpo.yaml", run=run_dpo, strength="dpo.beta"
    ),
    "online_dpo": Method(
        title="iterative DPO",
        schema=OnlineDPORunConfig,
        recipe="online_dpo.yaml",
        run=run_policy,
        strength="online_dpo.beta",
        rolls_out=True,
    ),
    "ppo": Method(
        title="PPO", schema=PPORunConfig, recipe="ppo.yaml", run=run_ppo, strength="ppo.kl_coef", rolls_out=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of the study. `starts_from` and `reward` are the names of points whose model it needs."""

    name: str
    method: str
    seed: int
    strength: float | None = None
    starts_from: str | None = None
    reward: str | None = None
    overrides: tuple[str, ...] = ()
    factors: dict[str, bool] = field(default_factory=dict)

    @property
    def parents(self) -> tuple[str, ...]:
        """Points that must be done before."""
        return tuple(name for name in (self.starts_from, self.reward) if name is not None)

    @property
    def is_policy(self) -> bool:
        """Whether it is judged; reward models are not."""
        return self.method != "reward"


def points_of(setting: SentimentSetting) -> list[Point]:
    """Every run, each after those that it needs."""
    found = [
        Point(name="reference", method="reference", seed=setting.seeds[0], overrides=tuple(setting.reference))
    ]
    for seed in setting.seeds:
        found.append(
            Point(
                name=f"reward_seed{seed}",
                method="reward",
                seed=seed,
                starts_from="reference",
                overrides=tuple(setting.reward),
            )
        )
        found += _swept(setting, seed)
    for seed in setting.seeds:
        found += _ablated(setting.ablation, seed) if setting.ablation is not None else []
    return found


def _swept(setting: SentimentSetting, seed: int) -> list[Point]:
    """SFT comes first, since DPO may start from it."""
    sweeps = setting.sweeps.given
    found: list[Point] = []
    # Every method's first strength, then every method's second: a study that is not finished compares methods.
    for number in range(max((len(sweep.strengths) for sweep in sweeps.values()), default=0)):
        for name, sweep in sweeps.items():
            start = found[0].name if name == "dpo_after_sft" else "reference"
            for strength in sweep.strengths[number : number + 1]:
                found.append(_point(name, strength, seed, sweep.overrides, start))
    return found


def _point(method: str, strength: float, seed: int, overrides: Sequence[str], start: str = "reference") -> Point:
    return Point(
        name=f"{method}_{strength:g}_seed{seed}",
        method=method,
        seed=seed,
        strength=strength,
        starts_from=start,
        reward=f"reward_seed{seed}" if METHODS[method].rolls_out else None,
        overrides=(*overrides, f"{METHODS[method].strength}={strength:g}"),
    )


def _ablated(ablation: AblationSetting, seed: int) -> list[Point]:
    found = []
    for large, whitened, moving in product((False, True), repeat=3):
        letters = "".join(word for word, on in (("B", large), ("A", whitened), ("E", moving)) if on) or "none"
        rate = ablation.large_ema_rate if large else ablation.small_ema_rate
        reference = [f"reference.ref_model_mixup_alpha={rate:g}"] if moving else []
        found.append(
            Point(
                name=f"ablation_{letters}_seed{seed}",
                method="ppo",
                seed=seed,
                starts_from="reference",
                reward=f"reward_seed{seed}",
                overrides=(
                    *ablation.overrides,
                    *(ablation.large_batch if large else ablation.small_batch),
                    f"ppo.whiten_advantages={str(whitened).lower()}",
                    f"reference.sync_ref_model={str(moving).lower()}",
                    *reference,
                ),
                factors={"large batch": large, "advantage normalisation": whitened, "reference EMA": moving},
            )
        )
    return found


def config_of(point: Point, setting: SentimentSetting, folder: Path) -> RunConfig:
    """The point's config, for its folder inside the study's."""
    method = METHODS[point.method]
    given = [f"output_dir={folder / point.name}", f"seed={point.seed}", "report_to=[]"]
    if point.starts_from is not None:
        given.append(f"{method.model}.model_name_or_path={folder / point.starts_from / 'final'}")
    if point.reward is not None:
        given.append(f"reward.model_name_or_path={folder / point.reward / 'final'}")
    if method.rolls_out:
        length = setting.completion_length
        given += [f"generation.max_completion_length={length}", f"generation.min_new_tokens={length}"]
        given.append("num_report_prompts=0")
    elif point.method != "reference":
        given.append(f"data.dataset_name={folder / ('chosen.jsonl' if point.method == 'sft' else 'pairs.jsonl')}")
    if point.method == "reward":
        given.append(f"data.eval_dataset_name={folder / 'pairs-heldout.jsonl'}")
    return load_config(method.schema, RUNS / method.recipe, [*given, *setting.shared, *point.overrides])


def key_of(config: RunConfig, parents: Sequence[str], judging: Sequence[Any]) -> str:
    """What a finished point is known by: its config, whatever folder it is in, its parents' keys, the judging.

    Defaults count too: a version of Meshift that has others, or further keys, runs its points again.
    """
    kept_out = {"output_dir", "resume", "overwrite_output_dir"}
    values = config.model_dump(mode="json", exclude=kept_out)
    for section, key in (("data", "dataset_name"), ("data", "eval_dataset_name")):
        if isinstance(values[section].get(key), str):
            values[section][key] = Path(values[section][key]).name
    for section in ("actor", "model", "reward", "critic"):
        values.get(section, {}).pop("model_name_or_path", None)
    text = json.dumps([type(config).__name__, values, list(parents), list(judging)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
