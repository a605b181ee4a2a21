"""`meshift ppo` and `meshift reward`: a config to a run, shown on the terminal.

It knows nothing of how a run works. What needs torch is imported when the config has been found right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meshift.cli.command import Command, InterruptedRunError, UsageError
from meshift.cli.tables import print_keys, print_metrics, print_rows
from meshift.config.loading import load_config
from meshift.config.runs import PPORunConfig, RewardRunConfig, RunConfig

if TYPE_CHECKING:
    from meshift.cli.progress import RichObserver
    from meshift.runtime.observer import Observer

# Of all metrics, those that tell in one line whether the run went well.
CLOSING_METRICS = (
    "reward/mean",
    "objective/kl",
    "response_length/mean",
    "loss",
    "accuracy",
    "eval/accuracy",
    "perf/time_per_step",
)


class Result(Protocol):
    """What a run returns, of which the command line shows this."""

    @property
    def output_dir(self) -> Path:
        """The run's folder."""

    @property
    def final_dir(self) -> Path:
        """The trained model."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the last step."""


Run = Callable[[Any, "Observer"], Result]
Check = Callable[[Any], list[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training command: its config and, imported when called for, its run and its dry run."""

    schema: type[RunConfig]
    load: Callable[[], tuple[Run, Check]]

    def __call__(self, args: argparse.Namespace) -> int:
        """Do what the options ask for."""
        if args.help_config:
            print_keys(self.schema)
            return 0
        file = next(
            (word for word in args.overrides if word.endswith((".yaml", ".yml")) and "=" not in word), None
        )
        if file is not None:
            raise UsageError(f"`{file}` is no key=value; did you mean `--config {file}`?")
        if args.config is None and not args.overrides:
            raise UsageError("a config is needed: --config run.yaml, or key=value; --help-config lists the keys")
        config = load_config(self.schema, args.config, args.overrides)
        from meshift.runtime.run_folder import check_output_dir

        # Before torch is imported and models are read: whoever mistyped should not have to wait.
        check_output_dir(Path(config.output_dir), overwrite=config.overwrite_output_dir)
        run, check = self.load()
        if args.dry_run:
            print_rows("dry run: nothing was trained", check(config))
        else:
            _run_and_show(run, config)
        return 0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run")
    parser.add_argument("--dry-run", action="store_true", help="check config, data and models; train nothing")
    parser.add_argument("--help-config", action="store_true", help="list every key, its default and its meaning")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key, over what the file says")


def _run_and_show(run: Run, config: RunConfig) -> None:
    from meshift.cli.progress import RichObserver

    with RichObserver() as observer:
        try:
            result = run(config, observer)
        except KeyboardInterrupt:
            raise InterruptedRunError(_kept(observer, config.output_dir)) from None
    chosen = {key: result.metrics[key] for key in CLOSING_METRICS if key in result.metrics}
    print_metrics("last step", chosen)
    print(f"model    {result.final_dir}\nmetrics  {result.output_dir / 'metrics.jsonl'}")


def _kept(observer: RichObserver, output_dir: str) -> str:
    if observer.num_done == 0:
        return f"interrupted before the first step was done; {output_dir} has nothing of this run"
    steps = "step 1" if observer.num_done == 1 else f"steps 1 to {observer.num_done}"
    return f"interrupted; {output_dir} keeps config, metrics and samples of {steps}, but no model"


def _load_ppo() -> tuple[Run, Check]:
    from meshift.runtime.ppo_run import check_ppo, run_ppo

    return run_ppo, check_ppo


def _load_reward() -> tuple[Run, Check]:
    from meshift.runtime.reward_run import check_reward, run_reward

    return run_reward, check_reward


PPO = Command(
    name="ppo",
    summary="align a model by PPO, with a critic, a reference and KL in the reward",
    description=(
        "Align a model by PPO: completions of your prompts are scored by a reward model, by Python\n"
        "functions, or both, and the model is trained towards higher scores while KL to a reference\n"
        "holds it back. Writes metrics.jsonl, samples.jsonl, TensorBoard curves and final/, a plain\n"
        "Hugging Face folder."
    ),
    example="meshift ppo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=_configure,
    run=Training(schema=PPORunConfig, load=_load_ppo),
)
REWARD = Command(
    name="reward",
    summary="train a reward model from preference pairs",
    description=(
        "Train a reward model (Bradley-Terry) from rows of prompt, chosen and rejected, and report its\n"
        "accuracy on held-out pairs. Writes metrics.jsonl, TensorBoard curves and final/, a plain\n"
        "Hugging Face folder that `reward.model_name_or_path` of `meshift ppo` takes."
    ),
    example="meshift reward --config reward.yaml data.batch_size=32 max_steps=200",
    configure=_configure,
    run=Training(schema=RewardRunConfig, load=_load_reward),
)
