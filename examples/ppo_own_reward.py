"""PPO with a reward and an observer of your own: `python examples/ppo_own_reward.py [MODEL]`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from meshift.config.loading import make_config
from meshift.config.runs import PPORunConfig
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.run import RunResult

PROMPTS = str(Path(__file__).with_name("prompts.jsonl"))


def brevity(completions: Sequence[str], **columns: object) -> list[float]:
    """The reward: short texts are better. Any column of the data may be named as an argument."""
    return [-len(text) / 100 for text in completions]


class Printer(SilentObserver):
    """Prints one line per step."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""
        print(f"step {step + 1}: reward {metrics['reward/mean']:.3f}, KL {metrics['objective/kl']:.3f}")


def main(model: str = "pypi:smollm2-135m-instruct", output_dir: str = "runs/examples/ppo") -> RunResult:
    """Three small steps; the result says where the model lies, and has the last step's metrics."""
    config = {
        "output_dir": output_dir,
        "overwrite_output_dir": True,
        "max_steps": 3,
        "data": {"dataset_name": PROMPTS, "batch_size": 8},
        "actor": {"model_name_or_path": model},
        "reward": {"functions": [{"function": f"{__file__}:brevity"}]},
        "generation": {"max_completion_length": 24},
        "ppo": {"num_mini_batches": 2, "missing_eos_penalty": 0.0},
    }
    return run_ppo(make_config(PPORunConfig, config), Printer())


if __name__ == "__main__":
    main(*sys.argv[1:])
