"""GRPO: completions of one prompt are each other's baseline.

Source: Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1. With scores r of a prompt's
completions, A = (r - mean(r)) / (std(r) + 1e-4) at every token; PPO's clipped objective; KL as a term of the loss.
"""

from __future__ import annotations

from functools import partial

from meshift.algorithms.group_baseline import group_advantages
from meshift.algorithms.policy_graph import Drawing, Method, clipped_loss, policy_graph
from meshift.config.policy_runs import GRPORunConfig
from meshift.graph.calls import Graph


def grpo_graph(config: GRPORunConfig, drawing: Drawing) -> Graph:
    """Several completions of each prompt, compared; token ratios."""
    method = Method(
        advantages=partial(group_advantages, scale=config.grpo.scale_rewards),
        loss=clipped_loss(config, drawing.sampling),
    )
    return policy_graph(config, drawing, method)
