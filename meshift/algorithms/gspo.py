"""GSPO: GRPO with one importance ratio for a whole completion, the geometric mean of its tokens' ratios.

Source: Zheng et al. 2025 (Group sequence policy optimization, arXiv 2507.18071), equations 5 to 7:
ratio = (p(completion) / p_old(completion))^(1 / length), clipped per completion.
"""

from __future__ import annotations

from functools import partial

from meshift.algorithms.group_baseline import group_advantages
from meshift.algorithms.policy_graph import Drawing, Method, clipped_loss, policy_graph
from meshift.config.policy_runs import GSPORunConfig
from meshift.graph.calls import Graph


def gspo_graph(config: GSPORunConfig, drawing: Drawing) -> Graph:
    """Several completions of each prompt, compared; ratios of completions, per token on average."""
    method = Method(
        advantages=partial(group_advantages, scale=config.gspo.scale_rewards),
        loss=clipped_loss(config, drawing.sampling, importance="mean"),
    )
    return policy_graph(config, drawing, method)
