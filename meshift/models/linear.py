"""Linear layers whose input may be cut: then this process has some of its columns and gives a part of a sum.

Knows nothing of processes: how the sum is taken is told to it.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class SummedLinear(nn.Linear):
    """`x W' + b`. With a `total`, W has some columns only: `total(x W') + b`, where `total` adds up all parts."""

    total: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[T, columns that are here] -> [T, out]."""
        if self.total is None:
            return F.linear(x, self.weight, self.bias)
        rows = self.total(F.linear(x, self.weight))
        return rows if self.bias is None else rows + self.bias
