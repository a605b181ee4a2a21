"""Proof that the fast paths compute what their plain twins do: log-probs of packed rows, and of sampled tokens.

`python -m benchmarks.agreement`, asked over stdin. The twin runs sequences one by one, attention written out.
"""

from __future__ import annotations

import json
import os
from copy import deepcopy
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

TOLERANCE = 1e-4
"""Mean absolute difference to the twin in float32, in nats."""
ROOM = 1.1
"""In bfloat16 two ways of rounding are each some 0.03 nats from the truth, float32 over the same weights, and as
far from each other: logits near 20 are 1/8 apart. So a fast path is held to the truth: it may miss it by this
many times what its twin misses it by."""
NUM_TEXTS = 8
NEW_TOKENS = 32
Gaps = dict[str, float]


class Agreement:
    """Answers with the differences in both compute types."""

    def start(self, *, model: str, texts: str, prompts: str) -> Reply:
        """Compare; raises `AssertionError` where a fast path is worse than its twin (`TOLERANCE`, `ROOM`)."""
        rows = json.loads(Path(texts).read_text(encoding="utf-8"))[:NUM_TEXTS]
        openings = json.loads(Path(prompts).read_text(encoding="utf-8"))["forced"][:NUM_TEXTS]
        found = {name: compare(model, name, rows, openings) for name in ("bfloat16", "float32")}
        for name, differences in found.items():
            for what, gap in differences.items():
                assert gap["error"] <= ROOM * gap["twin_error"] or gap["twin_mean"] <= TOLERANCE, (
                    f"{what} in {name}: {gap['twin_mean']:.2g} nats from the twin and {gap['error']:.2g} from the "
                    f"truth, which the twin misses by {gap['twin_error']:.2g}"
                )
        return {"differences": found, "tolerance": {"float32": TOLERANCE, "bfloat16, times the twin's": ROOM}}


def compare(model: str, dtype: str, rows: list[list[int]], prompts: list[list[int]]) -> dict[str, Gaps]:
    """Of a reading, and of what a sampler says it drew from: see `gaps`."""
    role = LocalRole("actor", open_model(model, "lm", compute_dtype(dtype)), TrainableConfig())
    truth = deepcopy(role.model).float()
    reading = role.infer(TokenLogprobs(), text_batch(rows)).batch["new_logprobs"].values
    role.can_generate(NUM_TEXTS, open_tokenizer(model).decode)
    assert role.generator is not None
    drawn = role.generator.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS), seed=0)
    said = torch.tensor([value for completion in drawn for value in completion.logprobs])
    texts = [[*prompt, *completion.tokens] for prompt, completion in zip(prompts, drawn, strict=True)]
    return {
        "read log-probs": gaps(reading, role.model, truth, rows, [1] * len(rows)),
        "sampled log-probs": gaps(said, role.model, truth, texts, [len(prompt) for prompt in prompts]),
    }


def gaps(ours: Tensor, model: Decoder, truth: Decoder, rows: list[list[int]], firsts: list[int]) -> Gaps:
    """Differences in nats of the log-probs of each row from its token `first` on.

    `twin_mean` and `twin_max` to the twin; `error` and `twin_error`: ours and the twin's mean to the truth.
    """
    twin, true = (
        torch.cat([plain_logprobs(one, row)[first - 1 :] for row, first in zip(rows, firsts, strict=True)])
        for one in (model, truth)
    )
    apart = (ours.cpu().float() - twin).abs()
    return {
        "twin_mean": float(apart.mean()),
        "twin_max": float(apart.max()),
        "error": float((ours.cpu().float() - true).abs().mean()),
        "twin_error": float((twin - true).abs().mean()),
    }


@torch.inference_mode()
def plain_logprobs(model: Decoder, row: list[int]) -> Tensor:
    """Log-probs of a text's tokens from the second on."""
    device = next(model.parameters()).device
    tokens = torch.tensor(row, device=device)
    hidden = model(tokens, packed_positions([len(row)], device), PlainAttention([len(row)]))
    logprobs = model.head(hidden[:-1]).float().log_softmax(-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0].cpu()


def main() -> None:
    """Serve."""
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", torch.get_num_threads())))
    serve(Agreement(), packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
