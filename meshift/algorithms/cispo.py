"""CISPO: importance weights are clipped, and no token loses its gradient.

Source: MiniMax 2025 (MiniMax-M1, arXiv 2506.13585), section 3.1, equations 4 and 5: the loss per token is
-stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * logprob, with GRPO's advantages and no KL.
"""

from __future__ import annotations

from functools import partial

from meshift.algorithms.group_baseline import group_advantages
from meshift.algorithms.policy_graph import Drawing, Method, loss_keys, policy_graph
from meshift.algorithms.policy_losses import ClippedWeightLoss
from meshift.config.policy_runs import CISPORunConfig
from meshift.graph.calls import Graph


def cispo_graph(config: CISPORunConfig, drawing: Drawing) -> Graph:
    """Several completions of each prompt, compared; weighted log-probs."""
    method = Method(
        advantages=partial(group_advantages, scale=config.cispo.scale_rewards),
        loss=ClippedWeightLoss(**loss_keys(config, drawing.sampling)),
    )
    return policy_graph(config, drawing, method)
