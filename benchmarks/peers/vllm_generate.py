"""vLLM as a peer, in one process: its engine on all of a batch's prompts at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.serve import Reply, serve

CACHE_GB = 2


class Generation:
    """Sampling at temperature 1, of a forced length or up to the natural end."""

    def start(self, *, model: str, prompts: str, batch: int, max_new_tokens: int, natural: bool) -> Reply:
        """Load the model. Its processors are bound one to a thread."""
        threads = int(os.environ["BENCHMARK_THREADS"])
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if threads > 1 else "0"
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            model,
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        kind = "natural" if natural else "forced"
        rows = json.loads(Path(prompts).read_text(encoding="utf-8"))[kind][:batch]
        self.prompts = [{"prompt_token_ids": row} for row in rows]
        self.params = SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            max_tokens=max_new_tokens,
            ignore_eos=not natural,
            detokenize=False,
        )
        return {"settings": f"bfloat16, {CACHE_GB} GB of key-value cache"}

    def round(self, *, number: int) -> Reply:
        """Complete every prompt once."""
        del number  # its random numbers go on from round to round
        outputs = self.llm.generate(self.prompts, self.params, use_tqdm=False)
        return {"num_tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}


def main() -> None:
    """Serve generation."""
    serve(Generation(), packages=("torch", "vllm-cpu"))


if __name__ == "__main__":
    main()
