"""REINFORCE++: rewards per token, returns without a critic, advantages normalised over the whole step.

Source: Hu et al. 2025 (REINFORCE++, arXiv 2501.03262). Rewards are the score, at the last token, and -kl_coef * KL
at each; A_t = sum over s >= t of gamma^(s - t) * reward_s, then zero mean and unit variance over all tokens of the
step. Its baseline form takes the mean of the prompt's completions off each score first, and pays KL in the loss.
"""

from __future__ import annotations

from functools import partial

import torch

from meshift.algorithms.advantages import group_mean, has_signal, returns_to_go, token_rewards, whiten
from meshift.algorithms.policy_graph import Drawing, Method, Scored, clipped_loss, policy_graph
from meshift.batch import Ragged
from meshift.config.policy_runs import ReinforcePPRunConfig
from meshift.config.policy_sections import ReinforcePPConfig
from meshift.graph.calls import Graph


def reinforce_pp_graph(config: ReinforcePPRunConfig, drawing: Drawing) -> Graph:
    """One or several completions of each prompt; token ratios."""
    method = Method(
        advantages=partial(reinforce_pp_advantages, keys=config.reinforce_pp),
        loss=clipped_loss(config, drawing.sampling),
    )
    return policy_graph(config, drawing, method)


def reinforce_pp_advantages(scored: Scored, keys: ReinforcePPConfig) -> tuple[Ragged, dict[str, float]]:
    """See the module. Tokens of completions that nothing scored are in no statistic."""
    scores = scored.scores.double()
    if keys.baseline == "group":
        given = (scores, scored.judged, scored.num_generations)
        scores = torch.where(has_signal(*given), scores - group_mean(*given), 0.0)
    penalty = Ragged(scored.penalty.values.double(), scored.lengths)
    returns = returns_to_go(token_rewards(penalty, 1.0, scores, scored.judged), keys.gamma)
    judged = scored.judged.repeat_interleave(scored.lengths)
    values = torch.zeros_like(returns.values)
    values[judged] = whiten(returns.values[judged])
    return Ragged(values, scored.lengths), {"objective/returns/mean": float(returns.values[judged].mean())}
