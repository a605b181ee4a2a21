"""Meshift's side of a duel: `python -m benchmarks.ours <work>`, asked over stdin (`serve.py`).

It uses the entry points that a run uses (roles, jobs, `run_step`) and knows nothing of the peers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve import Reply, Server, serve, settle
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.generation.params import SamplingParams
from meshift.runtime.models import compute_dtype, open_model, open_tokenizer, stop_token_ids
from meshift.runtime.role import LocalRole, open_role
from meshift.runtime.run import Job
from meshift.step import run_step
from meshift.training.readings import TokenLogprobs

DTYPE = "bfloat16"


class Generation:
    """Sampling at temperature 1, of a forced length or up to the natural end."""

    def start(self, *, model: str, prompts: str, batch: int, max_new_tokens: int, natural: bool) -> Reply:
        """Load the actor."""
        tokenizer = open_tokenizer(model)
        kind = "natural" if natural else "forced"
        self.prompts = json.loads(Path(prompts).read_text(encoding="utf-8"))[kind][:batch]
        stops = stop_token_ids(model, tokenizer) if natural else ()
        self.params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=stops)
        role = open_role("actor", model, "lm", compute_dtype(DTYPE)).can_generate(batch, tokenizer.decode)
        assert role.generator is not None
        self.engine = role.generator
        return {"settings": f"{DTYPE}, {batch} slots"}

    def round(self, *, number: int) -> Reply:
        """Complete every prompt once."""
        completions = self.engine.generate(self.prompts, self.params, seed=number)
        lengths = [len(c.tokens) for c in completions]
        return {"num_tokens": sum(lengths), "lengths": lengths}


class Inference:
    """Log-probs of the texts' tokens, without gradients."""

    def start(self, *, model: str, texts: str, batch: int) -> Reply:
        """Load the model, and the texts as prompts of one token and completions of the rest."""
        ids = json.loads(Path(texts).read_text(encoding="utf-8"))
        self.batches = [text_batch(ids[i : i + batch]) for i in range(0, len(ids) - batch + 1, batch)]
        self.role = LocalRole("actor", open_model(model, "lm", compute_dtype(DTYPE)), TrainableConfig())
        return {"settings": f"{DTYPE}, packed"}

    def round(self, *, number: int) -> Reply:
        """Read one batch."""
        batch = self.batches[number % len(self.batches)]
        self.role.infer(TokenLogprobs(), batch)
        lengths = batch["tokens"].lengths.tolist()
        return {"num_tokens": sum(lengths), "lengths": lengths}


def text_batch(rows: list[list[int]]) -> Batch:
    """Texts whose first token is the prompt."""
    fields = {
        "tokens": Ragged.from_rows(rows, torch.int64),
        "completion_lengths": Ragged.scalars([len(row) - 1 for row in rows], torch.int64),
    }
    return Batch(fields)


class Training:
    """One step of a job's graph a round: an optimizer step, or in RL a whole step."""

    job: Job

    def start(self, *, config: dict[str, Any], method: str) -> Reply:
        """Build the job that `meshift <method>` would run."""
        from benchmarks.jobs import build_job

        self.job = build_job(method, config)
        return {"settings": f"{DTYPE} with fp32 masters, packed"}

    def round(self, *, number: int) -> Reply:
        """One step; the split by call is in `calls`."""
        batch = self.job.next_batch(number)
        started = time.perf_counter()
        outcome = run_step(self.job.graph, self.job.roles, batch, number)
        settle()
        seconds = time.perf_counter() - started
        prefix = "timing_s/"
        calls = {k.removeprefix(prefix): round(v, 4) for k, v in outcome.metrics.items() if k.startswith(prefix)}
        loss = {k: v for k, v in outcome.metrics.items() if k == "loss" or k.endswith("/loss")}
        lengths = {k: lengths_of(outcome.batch, k) for k in ("tokens", "chosen", "rejected", "completion_lengths")}
        return {
            "seconds": seconds,
            "num_tokens": self.job.num_tokens(outcome.batch),
            "calls": calls,
            "loss": loss,
            "lengths": {key: found for key, found in lengths.items() if found},
            "num_prompt_tokens": values_of(batch, "num_prompt_tokens"),
        }


def lengths_of(batch: Batch, key: str) -> list[int]:
    """Lengths of a key's rows; of a key that is itself a length, its values."""
    if key.endswith("lengths"):
        return values_of(batch, key)
    return batch[key].lengths.tolist() if key in batch else []


def values_of(batch: Batch, key: str) -> list[int]:
    """A key's values; nothing where the batch has no such key."""
    return batch[key].values.tolist() if key in batch else []


def main() -> None:
    """Serve the work named on the command line."""
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", torch.get_num_threads())))
    servers: dict[str, type[Server]] = {"generation": Generation, "inference": Inference, "training": Training}
    server = servers[sys.argv[1]]()
    serve(server, packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
