"""A reward function as OpenRLHF's `--remote_rm_url path/to/file.py` names it. It knows nothing of Meshift."""

from typing import Any

import torch


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """1 for an answer that names the right number at once, less the longer it takes to come to it; else 0."""
    answers = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    places = torch.tensor([answer.find(label) for answer, label in zip(answers, labels, strict=True)])
    rewards = torch.where(places < 0, 0.0, 1 / (1 + places / 40))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"named": (rewards > 0).float()}}
