"""ORPO: likelihood of the chosen text, with the odds ratio of chosen and rejected; no reference.

Source: Hong et al. 2024 (ORPO, arXiv 2403.07691), equations 6 and 7; the formula is in `ORPOLoss`. It knows
nothing of data files.
"""

from __future__ import annotations

from meshift.algorithms.pair_graph import pair_graph
from meshift.algorithms.preference_losses import ORPOLoss
from meshift.config.runs import ORPORunConfig
from meshift.graph.calls import Graph


def orpo_loss(config: ORPORunConfig) -> ORPOLoss:
    """The loss that a config asks for, of training and of held-out pairs."""
    return ORPOLoss(beta=config.orpo.beta)


def orpo_graph(config: ORPORunConfig) -> Graph:
    """One update per step, on all of the step's pairs."""
    return pair_graph(orpo_loss(config))
