"""A reward function as OpenRLHF's `--remote_rm_url path/to/file.py` names it. It knows nothing of Meshift."""

import torch


def reward_func(queries, prompts, labels):
    """1 for an answer that names the right number at once, less the longer it takes to come to it; else 0."""
    rewards = []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        answer = query[len(prompt) :]
        place = answer.find(label)
        rewards.append(0.0 if place < 0 else 1 / (1 + place / 40))
    rewards = torch.tensor(rewards)
    return {"rewards": rewards, "scores": rewards.clamp(0, 1), "extra_logs": {"named": (rewards > 0).float()}}
