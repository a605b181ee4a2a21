"""How old the weights may be that drew a batch: a role's versions at the start of its last steps.

It knows nothing of who draws batches, or when.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meshift.errors import StaleWeightsError


class Ages:
    """Of a role named `name`. With `max_staleness` k, tokens may lack the updates of the last k steps, no more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._starts: list[int] = []

    def check(self, versions: Tensor, current: int, max_staleness: int) -> dict[str, float]:
        """A step begins with weights of version `current`, on tokens of `versions` [tokens].

        Gives by how many steps' updates these were behind. Raises `StaleWeightsError` for weights that are older
        than may be, or that the role has not had.
        """
        self._starts = [*self._starts[-max_staleness:], current] if max_staleness > 0 else []
        oldest, drawn = min(self._starts, default=current), sorted(set(versions.tolist()))
        if drawn and (drawn[0] < oldest or drawn[-1] > current):
            raise StaleWeightsError(self._sentence(drawn, current, max_staleness))
        if not self._starts or not drawn:
            return {}
        behind = (torch.tensor(self._starts)[None, :] > versions[:, None]).sum(1)
        return {
            "off_policy/staleness_mean": float(behind.double().mean()),
            "off_policy/staleness_max": float(behind.max()),
        }

    def _sentence(self, drawn: list[int], current: int, max_staleness: int) -> str:
        who = f"role {self.name} has weights of version {current}"
        if max_staleness == 0:
            return (
                f"{who}, but the batch was sampled by version {drawn}: the generator did not get the last update"
            )
        return (
            f"{who}, and of version {self._starts[0]} `max_staleness` = {max_staleness} steps ago, but the batch "
            f"was sampled by version {drawn}: it is staler than may be"
        )

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps: nothing where no step may look back."""
        return {"step_versions": self._starts} if self._starts else {}

    def load(self, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._starts = [int(version) for version in values.get("step_versions", ())]
