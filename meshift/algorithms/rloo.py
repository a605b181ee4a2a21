"""RLOO: REINFORCE on whole completions, each against the mean of the prompt's other completions.

Source: Ahmadian et al. 2024 (Back to basics, arXiv 2402.14740), equation 8, after Kool et al. 2019. With R the
score less kl_coef * KL of the completion, A_i = R_i - 1 / (k - 1) * sum over j != i of R_j, divided by nothing.
"""

from __future__ import annotations

from meshift.algorithms.advantages import leave_one_out
from meshift.algorithms.policy_graph import Drawing, Method, Scored, clipped_loss, policy_graph
from meshift.batch import Ragged
from meshift.config.policy_runs import RLOORunConfig
from meshift.graph.calls import Graph


def rloo_graph(config: RLOORunConfig, drawing: Drawing) -> Graph:
    """Several completions of each prompt, each against the others; the ratio of a completion, or of each token."""
    loss = clipped_loss(config, drawing.sampling, importance=config.rloo.importance)
    return policy_graph(config, drawing, Method(advantages=rloo_advantages, loss=loss))


def rloo_advantages(scored: Scored) -> tuple[Ragged, dict[str, float]]:
    """A_i at every token of completion i; zero where it is the only one of its prompt that was scored."""
    return scored.at_every_token(leave_one_out(scored.rewards, scored.judged, scored.num_generations)), {}
