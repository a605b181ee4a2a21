"""TRL's SFT, reward, DPO and GRPO trainers as peers, at the best settings that they document and a CPU can run.

SFT is padding-free (its loss never holds all logits). In this release DPO ignores `padding_free`, and the reward
trainer has none, so both pad. GRPO keeps no reference (beta 0) and generates with `transformers`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, logging

from benchmarks.peers.stepwise import Stepwise, Stopwatch
from benchmarks.serve import Reply, serve
from benchmarks.sizes import MAX_STEPS
from benchmarks.variety import word_variety

MICRO_BATCH = 8


class Training(Stepwise):
    """One optimizer step a round."""

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
        logging.set_verbosity_error()
        self.folder, self.model, self.precision = Path(folder), model, precision
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        micro = min(MICRO_BATCH, batch)
        shared = {
            "output_dir": str(self.folder / "trl"),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": batch // micro,
            "max_steps": MAX_STEPS,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "use_cpu": not torch.cuda.is_available(),
            "bf16": precision == "autocast",
            "gradient_checkpointing": False,
            "report_to": [],
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        make = {"sft": self.sft, "reward": self.reward, "dpo": self.dpo}
        if method == "grpo":
            trainer = self.grpo(shared, max_new_tokens, num_generations)
        else:
            trainer = make[method](shared)
            trainer._get_train_sampler = lambda *args, **kwargs: SequentialSampler(trainer.train_dataset)
        self.begin(trainer, watched(trainer), counted(trainer, method))
        padding = "padding-free" if method == "sft" else "padded"
        return {"settings": f"{precision}, {padding}, micro-batches of {micro}"}

    def sft(self, shared: dict[str, Any]) -> Any:
        """Fine-tuning on token ids."""
        rows = Dataset.from_list([{"input_ids": ids} for ids in self._ids("sft")])
        args = trl.SFTConfig(**shared, max_length=None, padding_free=True)
        return trl.SFTTrainer(self._lm(), args=args, train_dataset=rows, processing_class=self.tokenizer)

    def reward(self, shared: dict[str, Any]) -> Any:
        """A reward model from pairs of token ids."""
        sides = ("chosen", "rejected")
        rows = [{f"{side}_ids": r["prompt"] + r[side] for side in sides} for r in self._ids("pairs")]
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=1, dtype=self._dtype)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        args = trl.RewardConfig(**shared, max_length=None)
        return trl.RewardTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer
        )

    def dpo(self, shared: dict[str, Any]) -> Any:
        """DPO with a reference in memory, on pairs of token ids."""
        rows = [{f"{key}_ids": ids for key, ids in row.items()} for row in self._ids("pairs")]
        args = trl.DPOConfig(**shared, max_length=None)
        return TokenisedDPO(
            self._lm(),
            ref_model=self._lm(),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )

    def grpo(self, shared: dict[str, Any], max_new_tokens: int, num_generations: int) -> Any:
        """GRPO with a Python reward; completions of a forced length."""
        rows = [json.loads(line) for line in (self.folder / "rl.jsonl").read_text("utf-8").splitlines()]
        args = trl.GRPOConfig(
            **shared,
            num_generations=num_generations,
            max_completion_length=max_new_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            shuffle_dataset=False,
            generation_kwargs={"min_new_tokens": max_new_tokens},
        )
        return trl.GRPOTrainer(
            self._lm(),
            reward_funcs=word_variety,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "pure_bf16" else torch.float32

    def _lm(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self._dtype)

    def _ids(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


class TokenisedDPO(trl.DPOTrainer):
    """Takes token ids as they are: this release tokenises texts itself, and would see other tokens."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def watched(trainer: Any) -> Stopwatch:
    """Time the parts of a step."""
    watch = Stopwatch()
    watch.wrap(trainer.model, "generate", "generate")
    watch.wrap(trainer, "_get_per_token_logps_and_entropies", "log-probs")
    watch.wrap(trainer, "_generate_and_score_completions", "score and collate")
    watch.wrap(trainer, "compute_loss", "loss forward")
    return watch


def counted(trainer: Any, method: str) -> Counter[str]:
    """Count the real tokens that reach the loss."""
    counts: Counter[str] = Counter()
    compute_loss = trainer.compute_loss

    def counting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "grpo":
            counts["tokens"] += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        elif "attention_mask" in inputs:
            counts["tokens"] += int(inputs["attention_mask"].sum())
        else:  # padding-free: every position is a token
            counts["tokens"] += inputs["input_ids"].numel()
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    return counts


def main() -> None:
    """Serve."""
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    serve(Training(), packages=("torch", "transformers", "trl"))


if __name__ == "__main__":
    main()
