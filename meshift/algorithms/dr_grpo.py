"""Dr. GRPO: GRPO without what favours long wrong answers and very easy or very hard prompts.

Source: Liu et al. 2025 (Understanding R1-Zero-like training, arXiv 2503.20783), section 3. A = r - mean(r), not
divided by the group's standard deviation; tokens are summed, and divided by a constant in place of their number.
"""

from __future__ import annotations

from functools import partial

from meshift.algorithms.group_baseline import group_advantages
from meshift.algorithms.policy_graph import Drawing, Method, clipped_loss, policy_graph
from meshift.config.policy_runs import DrGRPORunConfig
from meshift.graph.calls import Graph


def dr_grpo_graph(config: DrGRPORunConfig, drawing: Drawing) -> Graph:
    """Several completions of each prompt, compared and not scaled; token ratios."""
    method = Method(
        advantages=partial(group_advantages, scale="none"),
        loss=clipped_loss(config, drawing.sampling),
    )
    return policy_graph(config, drawing, method)
