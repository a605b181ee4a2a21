"""TRL's PPO as a peer, in the last release that had it: policy, critic, reference and reward model of one size.

A batch is one rollout, gone through four times in four mini-batches, an update each.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, logging
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers.stepwise import Stepwise, Stopwatch
from benchmarks.serve import Reply, serve
from benchmarks.sizes import MAX_STEPS, PPO_EPOCHS, PPO_MINI_BATCHES


class PPO(Stepwise):
    """One rollout and its updates a round."""

    def start(
        self,
        *,
        method: str,
        model: str,
        folder: str,
        batch: int,
        max_new_tokens: int,
        learning_rate: float,
        num_generations: int,
        precision: str,
    ) -> Reply:
        """Make the trainer; `precision` is "pure_bf16" (bf16 weights) or "autocast" (fp32 weights)."""
        del method, num_generations
        logging.set_verbosity_error()
        dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        ids = json.loads((Path(folder) / "rl.json").read_text(encoding="utf-8"))
        rows = Dataset.from_list([{"input_ids": row} for row in ids])
        args = arguments(Path(folder), batch, max_new_tokens, learning_rate, autocast=precision == "autocast")

        def lm() -> Any:
            return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

        def scorer() -> Any:
            path = Path(folder) / "reward_model"
            return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)

        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=lm(),
            ref_model=lm(),
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
        )
        watch = Stopwatch()
        self.begin(trainer, watch, instrument(watch, trainer))
        return {"settings": f"{precision}, {PPO_EPOCHS} x {PPO_MINI_BATCHES} updates"}


def arguments(folder: Path, batch: int, max_new_tokens: int, learning_rate: float, *, autocast: bool) -> PPOConfig:
    """TRL's settings. A device batch is the whole rollout, so that every mini-batch is one update."""
    return PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_mini_batches=PPO_MINI_BATCHES,
        num_ppo_epochs=PPO_EPOCHS,
        total_episodes=batch * MAX_STEPS,
        local_rollout_forward_batch_size=batch,
        response_length=max_new_tokens,
        temperature=1.0,
        num_sample_generations=0,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        bf16=autocast,
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def instrument(watch: Stopwatch, trainer: Any) -> Counter[str]:
    """Time the functions of TRL's module, and count the rollouts' tokens."""
    counts: Counter[str] = Counter()
    generation = ppo_trainer.batch_generation

    def counting(*args: Any, **kwargs: Any) -> Any:
        sequences, logits = generation(*args, **kwargs)
        counts["tokens"] += sequences.numel()
        return sequences, logits

    forward = ppo_trainer.forward
    train, read = watch.timed("train forward", forward), watch.timed("reference", forward)

    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        return (train if model is trainer.model else read)(model, *args, **kwargs)

    ppo_trainer.batch_generation = watch.timed("generate", counting)
    ppo_trainer.forward = run
    watch.wrap(ppo_trainer, "get_reward", "values and rewards")
    watch.wrap(trainer.optimizer, "step", "optimizer")
    return counts


def main() -> None:
    """Serve."""
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    serve(PPO(), packages=("torch", "transformers", "trl"))


if __name__ == "__main__":
    main()
