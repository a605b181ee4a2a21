"""Linear layers, by Meshift's kernels where they serve. Some may have a part of their columns here only, and then
give a part of a sum.

Knows nothing of processes: how the sum is taken is told to it.
"""

from collections.abc import Callable

import torch
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


@torch.no_grad()
def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W + scale B A` in fp32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


class Linear(nn.Linear):
    """`x W' + b`, and with an adapter `+ scale (x A') B'` (see `models.config.Adapter`)."""

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.lora_rank, self.lora_scale = 0, 1.0

    def adapt(self, rank: int, scale: float) -> None:
        """Give it an adapter whose numbers are for others to fill."""
        self.lora_rank, self.lora_scale = rank, scale
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_empty(self.out_features, rank))

    @property
    def is_adapted(self) -> bool:
        """Whether it has an adapter."""
        return self.lora_a is not None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        rows, added = project(x, self.weight, self.bias), self.added(x)
        return rows if added is None else rows + added

    def added(self, x: Tensor) -> Tensor | None:
        """What the adapter adds, `scale (x A') B'` [T, out]; None without one."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return project(project(x, self.lora_a) * self.lora_scale, self.lora_b)

    def merged(self) -> Tensor:
        """`W + scale B A`, summed in fp32 and rounded once to the weight's type; without an adapter W itself."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight.detach()
        return merge(self.weight, self.lora_a, self.lora_b, self.lora_scale).to(self.weight.dtype)


class SummedLinear(Linear):
    """`x W' + b`. With a `total`, W has some columns only: `total(x W') + b`, where `total` adds up all parts.

    Of an adapter A then has the same columns, and what it adds is part of the sum.
    """

    total: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[T, columns that are here] -> [T, out]."""
        if self.total is None:
            return super().forward(x)
        rows, added = project(x, self.weight), self.added(x)
        rows = self.total(rows if added is None else rows + added)
        return rows if self.bias is None else rows + self.bias
