"""OpenVINO GenAI as a peer: its continuous batching on an f16 GGUF, computing in bf16.

The GGUF is written from the quantised one that the project's model is made from, so the weights are the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino
import openvino_genai

from benchmarks.serve import Reply, serve

CACHE_GB = 3


class Generation:
    """Sampling at temperature 1, of a forced length or up to the natural end."""

    def start(self, *, gguf_file: str, prompts: str, batch: int, max_new_tokens: int, natural: bool) -> Reply:
        """Load the model from `<folder of prompts>/model-f16.gguf`, which is written if it is missing."""
        path = Path(prompts).parent / "model-f16.gguf"
        if not path.exists():
            write_f16(Path(gguf_file), path)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = 4096
        scheduler.max_num_seqs = 256
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": int(os.environ["BENCHMARK_THREADS"]),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)
        kind = "natural" if natural else "forced"
        rows = json.loads(Path(prompts).read_text(encoding="utf-8"))[kind][:batch]
        self.prompts = [openvino.Tensor(np.array([row], dtype=np.int64)) for row in rows]
        self.max_new_tokens, self.natural = max_new_tokens, natural
        return {"settings": f"bf16 from an f16 GGUF, {CACHE_GB} GB of key-value cache"}

    def round(self, *, number: int) -> Reply:
        """Complete every prompt once."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = self.max_new_tokens
        config.ignore_eos = not self.natural
        if self.natural:
            config.eos_token_id = 2
            config.stop_token_ids = {2}
        config.do_sample = True
        config.temperature, config.top_p, config.top_k, config.rng_seed = 1.0, 1.0, 0, number
        results = self.pipeline.generate(self.prompts, [config] * len(self.prompts))
        return {"num_tokens": sum(len(_tokens(result)) for result in results)}


def _tokens(result: Any) -> list[int]:
    if hasattr(result, "m_generation_ids"):
        return list(result.m_generation_ids[0])
    return list(result.get_generation_ids()[0])


def write_f16(source: Path, target: Path) -> None:
    """The same GGUF with every quantised tensor as f16; norms stay f32."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.get_field("general.architecture").contents())
    aside = target.with_suffix(".part")
    writer = gguf.GGUFWriter(aside, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.replace(target)


def main() -> None:
    """Serve generation."""
    serve(Generation(), packages=("openvino", "openvino-genai"))


if __name__ == "__main__":
    main()
