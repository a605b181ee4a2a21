"""SimPO: the chosen text's mean log-prob per token is to be ahead by a margin; no reference.

Source: Meng et al. 2024 (SimPO, arXiv 2405.14734), equation 6; the formula is in `SimPOLoss`. It knows nothing of
data files.
"""

from __future__ import annotations

from meshift.algorithms.pair_graph import pair_graph
from meshift.algorithms.preference_losses import SimPOLoss
from meshift.config.runs import SimPORunConfig
from meshift.graph.calls import Graph


def simpo_loss(config: SimPORunConfig) -> SimPOLoss:
    """The loss that a config asks for, of training and of held-out pairs."""
    return SimPOLoss(beta=config.simpo.beta, gamma=config.simpo.gamma)


def simpo_graph(config: SimPORunConfig) -> Graph:
    """One update per step, on all of the step's pairs."""
    return pair_graph(simpo_loss(config))
