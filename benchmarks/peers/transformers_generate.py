"""`transformers.generate` as a peer: prompts padded on the left, a dynamic or a static cache."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.serve import Reply, Server, serve

DTYPE = torch.bfloat16


class Generation:
    """Sampling at temperature 1, of a forced length or up to the natural end."""

    def start(
        self, *, model: str, prompts: str, batch: int, max_new_tokens: int, natural: bool, cache: str
    ) -> Reply:
        """Load the model; `cache` is "dynamic" or "static"."""
        logging.set_verbosity_error()
        self.eos = AutoTokenizer.from_pretrained(model).eos_token_id
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE).to(device).eval()
        kind = "natural" if natural else "forced"
        rows = json.loads(Path(prompts).read_text(encoding="utf-8"))[kind][:batch]
        longest = max(map(len, rows))
        self.ids = torch.tensor([[self.eos] * (longest - len(r)) + r for r in rows], device=device)
        self.mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
        # A model's own end of sequence would still end a forced length.
        self.model.generation_config.eos_token_id = self.eos if natural else None
        self.options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": self.eos if natural else None,
            "pad_token_id": self.eos,
            "cache_implementation": cache,
        }
        self.natural = natural
        return {"settings": f"bfloat16, {cache} cache"}

    @torch.inference_mode()
    def round(self, *, number: int) -> Reply:
        """Complete every prompt once; tokens behind a sequence's end do not count."""
        torch.manual_seed(number)
        out = self.model.generate(self.ids, attention_mask=self.mask, **self.options)
        new = out[:, self.ids.shape[1] :]
        if not self.natural:
            return {"num_tokens": new.numel()}
        ended = new.eq(self.eos).int().cumsum(1) - new.eq(self.eos).int()
        return {"num_tokens": int((ended == 0).sum())}


class Inference:
    """Log-probs of the texts' tokens, without gradients: full logits of a padded batch, as is usual."""

    def start(self, *, model: str, texts: str, batch: int) -> Reply:
        """Load the model and pad the texts on the right, texts of like length together."""
        logging.set_verbosity_error()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE).to(self.device).eval()
        self.model.config.use_cache = False
        ids = json.loads(Path(texts).read_text(encoding="utf-8"))
        self.batches = [ids[i : i + batch] for i in range(0, len(ids) - batch + 1, batch)]
        return {"settings": "bfloat16, sorted by length, 8 texts at a time"}

    @torch.inference_mode()
    def round(self, *, number: int) -> Reply:
        """Read one batch."""
        rows = sorted(self.batches[number % len(self.batches)], key=len)
        for start in range(0, len(rows), 8):
            self._read(rows[start : start + 8])
        return {"num_tokens": sum(map(len, rows))}

    def _read(self, rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=self.device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])


def main() -> None:
    """Serve the work named on the command line."""
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    servers: dict[str, type[Server]] = {"generation": Generation, "inference": Inference}
    serve(servers[sys.argv[1]](), packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
