"""Proof that the fast paths compute what their plain twins do: log-probs of packed rows, and of sampled tokens.

`python -m benchmarks.agreement`, asked over stdin. The twin runs sequences one by one, attention written out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ours import text_batch
from benchmarks.serve import Reply, serve
from meshift.config.sections import TrainableConfig
from meshift.generation.params import SamplingParams
from meshift.models.attention import PlainAttention, packed_positions
from meshift.models.decoder import Decoder
from meshift.runtime.models import compute_dtype, open_model, open_tokenizer
from meshift.runtime.role import LocalRole
from meshift.training.readings import TokenLogprobs

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
"""Mean absolute difference of log-probs, in nats. The largest is reported beside it: bf16 logits near 20 are 1/8
apart, so one rounding the other way is worth 0.1 nats."""
NUM_TEXTS = 8
NEW_TOKENS = 32


class Agreement:
    """Answers with the differences in both compute types."""

    def start(self, *, model: str, texts: str, prompts: str) -> Reply:
        """Compare; raises `AssertionError` where a difference is above `TOLERANCE`."""
        rows = json.loads(Path(texts).read_text(encoding="utf-8"))[:NUM_TEXTS]
        openings = json.loads(Path(prompts).read_text(encoding="utf-8"))["forced"][:NUM_TEXTS]
        found = {name: compare(model, name, rows, openings) for name in TOLERANCE}
        for name, differences in found.items():
            for what, (mean, _) in differences.items():
                assert mean <= TOLERANCE[name], f"{what} differ by {mean:.2g} nats in {name}"
        return {"differences": found, "tolerance": TOLERANCE}


def compare(
    model: str, dtype: str, rows: list[list[int]], prompts: list[list[int]]
) -> dict[str, tuple[float, float]]:
    """Mean and largest absolute difference to the twin: of a reading, and of what a sampler says it drew from."""
    role = LocalRole("actor", open_model(model, "lm", compute_dtype(dtype)), TrainableConfig())
    reading = role.infer(TokenLogprobs(), text_batch(rows)).batch["new_logprobs"].values
    plain = torch.cat([plain_logprobs(role.model, row) for row in rows])
    role.can_generate(NUM_TEXTS, open_tokenizer(model).decode)
    assert role.generator is not None
    drawn = role.generator.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS), seed=0)
    said = torch.tensor([value for completion in drawn for value in completion.logprobs])
    twins = [
        plain_logprobs(role.model, [*p, *c.tokens])[len(p) - 1 :] for p, c in zip(prompts, drawn, strict=True)
    ]
    return {
        "read log-probs": _differences(reading, plain),
        "sampled log-probs": _differences(said, torch.cat(twins)),
    }


@torch.inference_mode()
def plain_logprobs(model: Decoder, row: list[int]) -> Tensor:
    """Log-probs of a text's tokens from the second on."""
    device = next(model.parameters()).device
    tokens = torch.tensor(row, device=device)
    hidden = model(tokens, packed_positions([len(row)], device), PlainAttention([len(row)]))
    logprobs = model.head(hidden[:-1]).float().log_softmax(-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0].cpu()


def _differences(ours: Tensor, plain: Tensor) -> tuple[float, float]:
    apart = (ours.cpu().float() - plain).abs()
    return float(apart.mean()), float(apart.max())


def main() -> None:
    """Serve."""
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", torch.get_num_threads())))
    serve(Agreement(), packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
