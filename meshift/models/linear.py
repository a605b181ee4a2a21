"""Linear layers, by Meshift's kernels where they serve. Some may have a part of their columns here only, and then
give a part of a sum.

Knows nothing of processes: how the sum is taken is told to it.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from meshift.kernels import functions
from meshift.kernels.cpu import products_for


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W' + b` of rows [T, in]."""
    kernels = products_for(weight)
    fits = fits_kernels(weight) and x.dim() == 2 and x.dtype == weight.dtype
    if kernels is None or not fits:
        return F.linear(x, weight, bias)
    return functions.linear(kernels, x, weight, bias)


def fits_kernels(weight: Tensor) -> bool:
    """What the kernels need of a weight: they multiply numbers by pairs, row by row."""
    return weight.shape[0] % 2 == 0 and weight.shape[1] % 2 == 0 and weight.is_contiguous()


class Linear(nn.Linear):
    """`x W' + b`."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return project(x, self.weight, self.bias)


class SummedLinear(Linear):
    """`x W' + b`. With a `total`, W has some columns only: `total(x W') + b`, where `total` adds up all parts."""

    total: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[T, columns that are here] -> [T, out]."""
        if self.total is None:
            return project(x, self.weight, self.bias)
        rows = self.total(project(x, self.weight))
        return rows if self.bias is None else rows + self.bias
