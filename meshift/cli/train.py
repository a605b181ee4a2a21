"""`meshift sft`, `reward`, `dpo` and `ppo`: a config to a run, shown on the terminal.

It knows nothing of how a run works. What needs torch is imported when the config has been found right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meshift.cli.command import Command, InterruptedRunError, UsageError, add_way_on
from meshift.cli.counting import counts_shown
from meshift.cli.tables import print_keys, print_metrics, print_rows
from meshift.config.loading import load_config, read_values
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, RunConfig, SFTRunConfig
from meshift.errors import ConfigError, MeshiftError, ModelError

if TYPE_CHECKING:
    from meshift.cli.progress import RichObserver
    from meshift.runtime.observer import Observer

# Of all metrics, those that tell in one line whether the run went well.
CLOSING_METRICS = (
    "reward/mean",
    "objective/kl",
    "response_length/mean",
    "loss",
    "mean_token_accuracy",
    "accuracy",
    "margin",
    "eval/loss",
    "eval/perplexity",
    "eval/accuracy",
    "eval/margin",
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
        _read_resume(args)
        _read_plan(args)
        file = next(
            (word for word in args.overrides if word.endswith((".yaml", ".yml")) and "=" not in word), None
        )
        if file is not None:
            raise UsageError(f"`{file}` is no key=value; did you mean `--config {file}`?")
        if args.config is None and not args.overrides:
            raise UsageError("a config is needed: --config run.yaml, or key=value; --help-config lists the keys")
        config = self._config(args)
        from meshift.runtime.run_folder import check_output_dir

        # Before torch is imported and models are read: whoever mistyped should not have to wait.
        check_output_dir(Path(config.output_dir), overwrite=config.overwrite_output_dir or config.resume)
        run, check = self.load()
        if args.dry_run:
            with counts_shown():
                rows = _dry_run(check, config)
            print_rows("dry run: nothing was trained", rows)
        else:
            _run_and_show(run, config)
        return 0

    def _config(self, args: argparse.Namespace) -> RunConfig:
        try:
            return load_config(self.schema, args.config, args.overrides)
        except ConfigError:
            from meshift.cli.which_command import of_another_command

            values = read_values(args.config, args.overrides)
            elsewhere = of_another_command(values, args.config, self) if args.config is not None else None
            if elsewhere is not None:
                raise ConfigError(elsewhere) from None
            raise


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of every training command."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run")
    parser.add_argument("--dry-run", action="store_true", help="check config, data and models; train nothing")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint; a run's folder may stand for --config",
    )
    parser.add_argument(
        "--plan",
        metavar="auto|FILE",
        help="where calls run: auto: the planner chooses; a .yaml or .json file with a plan; none: one process",
    )
    parser.add_argument("--help-config", action="store_true", help="list every key, its default and its meaning")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key, over what the file says")


def _read_resume(args: argparse.Namespace) -> None:
    """`--resume runs/ppo` is the config in that folder, with that folder as output_dir."""
    if not args.resume:
        return
    folder = next((word for word in args.overrides if "=" not in word and Path(word).is_dir()), None)
    if folder is not None and args.config is None:
        args.overrides.remove(folder)
        args.config = str(Path(folder) / "config.yaml")
        args.overrides.append(f"output_dir={folder}")
    args.overrides.append("resume=true")


def _read_plan(args: argparse.Namespace) -> None:
    """`--plan auto` is `plan=auto`, `--plan none` is `plan=null`; keys that are given say more of it."""
    if args.plan is not None:
        args.overrides.insert(0, f"plan={'null' if args.plan == 'none' else args.plan}")


def _dry_run(check: Check, config: RunConfig) -> list[tuple[str, str]]:
    """What the run would do, whether or not it fits into this machine. Raises where weights are missing."""
    from meshift.runtime.preflight import as_it_would_run, memory_of, weight_problems

    config = as_it_would_run(config, partial(print, file=sys.stderr))
    rows = check(config)
    for problem in weight_problems(config):
        raise ModelError(problem)
    _, sentence = memory_of(config)
    return [*((what, sentence if what == "memory" else value) for what, value in rows), *_start(config)]


def _start(config: RunConfig) -> list[tuple[str, str]]:
    """Where a resumed run would go on, or what another one would delete, as a row of the dry run."""
    from meshift.runtime.resume import find_start, replaced

    if config.resume:
        return [("resume", "; ".join(find_start(config).notes))]
    return [("replaces", note) for note in replaced(config)]


def _run_and_show(run: Run, config: RunConfig) -> None:
    from meshift.cli.progress import RichObserver
    from meshift.models.hf.adapter_files import loading_by_peft
    from meshift.report.write import REPORT, write_report

    with RichObserver() as observer:
        try:
            result = run(config, observer)
        except KeyboardInterrupt:
            raise InterruptedRunError(_kept(observer, config.output_dir)) from None
        except MeshiftError as error:
            add_way_on(error, config.output_dir)
            raise
    chosen = {key: result.metrics[key] for key in CLOSING_METRICS if key in result.metrics}
    print_metrics("last step", chosen)
    print(f"model    {result.final_dir}")
    for expression in filter(None, map(loading_by_peft, sorted(result.output_dir.glob("final*")))):
        print(f"by peft  {expression}")
    print(f"metrics  {result.output_dir / 'metrics.jsonl'}")
    try:
        print(f"report   {write_report([result.output_dir], result.output_dir / REPORT)}")
    except MeshiftError as error:  # the run itself is done and saved
        print(f"meshift: no report was written: {error}", file=sys.stderr)


def _kept(observer: RichObserver, output_dir: str) -> str:
    from meshift.runtime.checkpoints import latest_name

    latest = latest_name(Path(output_dir))
    if observer.num_done == 0 and latest is None:
        return "interrupted before the first step was done: there is nothing to go on from"
    if observer.num_done == 0:
        return f"interrupted; --resume goes on from {output_dir}/{latest}"
    steps = "step 1" if observer.num_done == 1 else f"steps 1 to {observer.num_done}"
    model = "but no model" if latest is None else f"and {latest}; --resume goes on from there"
    return f"interrupted; {output_dir} keeps config, metrics and samples of {steps}, {model}"


def _load_ppo() -> tuple[Run, Check]:
    from meshift.runtime.ppo_run import check_ppo, run_ppo

    return run_ppo, check_ppo


def _load_reward() -> tuple[Run, Check]:
    from meshift.runtime.reward_run import check_reward, run_reward

    return run_reward, check_reward


def _load_sft() -> tuple[Run, Check]:
    from meshift.runtime.sft_run import check_sft, run_sft

    return run_sft, check_sft


def _load_dpo() -> tuple[Run, Check]:
    from meshift.runtime.dpo_run import check_dpo, run_dpo

    return run_dpo, check_dpo


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
    configure=configure,
    run=Training(schema=PPORunConfig, load=_load_ppo),
)
REWARD = Command(
    name="reward",
    summary="train a reward model from preference pairs",
    description=(
        "Train a reward model (Bradley-Terry) from rows of prompt, chosen and rejected, and report its\n"
        "accuracy on held-out pairs. The columns margin and weight are used where rows have them. Writes\n"
        "metrics.jsonl, TensorBoard curves and final/, a plain Hugging Face folder that\n"
        "`reward.model_name_or_path` of `meshift ppo` takes."
    ),
    example="meshift reward --config reward.yaml data.batch_size=32 max_steps=200",
    configure=configure,
    run=Training(schema=RewardRunConfig, load=_load_reward),
)
SFT = Command(
    name="sft",
    summary="fine-tune a model on demonstrations",
    description=(
        "Fine-tune a model on texts: rows of messages, of prompt and completion, or of plain text, and\n"
        "report loss and perplexity on held-out ones. The prompt is not trained on; data.loss_on says\n"
        "what is. Texts are packed without padding and never see each other. Writes metrics.jsonl,\n"
        "TensorBoard curves and final/, a plain Hugging Face folder."
    ),
    example="meshift sft --config sft.yaml data.loss_on=assistant num_train_epochs=2",
    configure=configure,
    run=Training(schema=SFTRunConfig, load=_load_sft),
)
DPO = Command(
    name="dpo",
    summary="align a model on preference pairs by DPO or IPO, without sampling",
    description=(
        "Align a model on rows of prompt, chosen and rejected: it is trained to prefer the chosen text\n"
        "more than a reference does (DPO, with label smoothing if you like, or IPO). Reports accuracy and\n"
        "margin on held-out pairs. Writes metrics.jsonl, TensorBoard curves and final/, a plain Hugging\n"
        "Face folder."
    ),
    example="meshift dpo --config dpo.yaml dpo.beta=0.05 dpo.precompute_ref_log_probs=true",
    configure=configure,
    run=Training(schema=DPORunConfig, load=_load_dpo),
)
