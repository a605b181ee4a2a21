"""Proof that the fast paths compute what their plain twins do: log-probs of packed rows, and of sampled tokens.

`python -m benchmarks.agreement`, asked over stdin. The twin runs in another process, without Meshift's kernels,
sequences one by one, attention written out: `python -m benchmarks.agreement FILE`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import text_batch
from benchmarks.serve import Reply, serve
from meshift.config.sections import TrainableConfig
from meshift.generation.params import SamplingParams
from meshift.kernels.build import SWITCH
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
    reading = role.infer(TokenLogprobs(), text_batch(rows)).batch["new_logprobs"].values
    role.can_generate(NUM_TEXTS, open_tokenizer(model).decode)
    assert role.generator is not None
    drawn = role.generator.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS), seed=0)
    said = torch.tensor([value for completion in drawn for value in completion.logprobs])
    texts = [[*prompt, *completion.tokens] for prompt, completion in zip(prompts, drawn, strict=True)]
    return {
        "read log-probs": gaps(reading, plain_process(model, dtype, rows, [1] * len(rows))),
        "sampled log-probs": gaps(said, plain_process(model, dtype, texts, [len(p) for p in prompts])),
    }


def gaps(ours: Tensor, plain: tuple[Tensor, Tensor]) -> Gaps:
    """Differences in nats. `twin_mean` and `twin_max` to the twin; `error`, `twin_error`: of both to the truth."""
    twin, true = plain
    ours = ours.cpu().float()
    return {
        "twin_mean": float((ours - twin).abs().mean()),
        "twin_max": float((ours - twin).abs().max()),
        "error": float((ours - true).abs().mean()),
        "twin_error": float((twin - true).abs().mean()),
    }


def plain_process(model: str, dtype: str, rows: list[list[int]], firsts: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probs of each row from its token `first` on, by the twin and in truth: without Meshift's kernels."""
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as file:
        json.dump({"model": model, "dtype": dtype, "rows": rows, "firsts": firsts}, file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.agreement", file.name]
        done = subprocess.run(command, env={**os.environ, SWITCH: "0"}, stdout=subprocess.PIPE, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return torch.tensor(answer["twin"]), torch.tensor(answer["truth"])


def plain(given: dict[str, Any]) -> dict[str, list[float]]:
    """What `plain_process` asks for: by the model as it is given, and by its weights in float32."""
    model = open_model(given["model"], "lm", compute_dtype(given["dtype"]))
    found = {}
    for name, one in (("twin", model), ("truth", deepcopy(model).float())):
        parts = [plain_logprobs(one, row)[n - 1 :] for row, n in zip(given["rows"], given["firsts"], strict=True)]
        found[name] = torch.cat(parts).float().tolist()
    return found


@torch.inference_mode()
def plain_logprobs(model: Decoder, row: list[int]) -> Tensor:
    """Log-probs of a text's tokens from the second on."""
    device = next(model.parameters()).device
    tokens = torch.tensor(row, device=device)
    hidden = model(tokens, packed_positions([len(row)], device), PlainAttention([len(row)]))
    logprobs = model.head(hidden[:-1]).float().log_softmax(-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0].cpu()


def main() -> None:
    """Serve, or be the twin."""
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", torch.get_num_threads())))
    if len(sys.argv) > 1:
        print(json.dumps(plain(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
        return
    serve(Agreement(), packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
