"""Norms of rows: root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32 whatever the dtype, and
layer norm as torch has it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshift.kernels import functions
from meshift.kernels.cpu import kernels_for
from meshift.models.config import DecoderConfig


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size] in the same dtype."""
        kernels = kernels_for(x)
        if kernels is not None and self.weight.dtype == x.dtype:
            return functions.rms_norm(kernels, x, self.weight, self.eps)
        if x.is_cuda:  # one fused kernel; elsewhere it is a chain of them that keeps fp32 copies of x
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _Normalise.apply(x, self.weight, self.eps)


class PlusOneRMSNorm(RMSNorm):
    """As `RMSNorm`, times `1 + weight`, a sum that bfloat16 would round: it is taken in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size] in the same dtype."""
        kernels = kernels_for(x)
        if kernels is not None and self.weight.dtype == x.dtype:
            return functions.rms_norm(kernels, x, self.weight, self.eps, plus_one=True)
        weight = 1.0 + self.weight.float()
        if x.is_cuda:
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return _Normalise.apply(x, weight, self.eps)


def norm_rows(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` where no gradient is asked for: on a CPU half the time for the few rows of a decode step.

    The last bits may differ from the module's.
    """
    kernels = kernels_for(x)
    if kernels is not None and type(norm) in (RMSNorm, PlusOneRMSNorm):
        assert isinstance(norm, RMSNorm)
        if norm.weight.dtype != x.dtype:
            return norm(x)
        plus_one = isinstance(norm, PlusOneRMSNorm)
        return kernels.rms_norm(x.contiguous(), norm.weight, norm.eps, plus_one=plus_one)
    if type(norm) is RMSNorm:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return norm(x)


def make_norm(config: DecoderConfig, size: int) -> nn.Module:
    """The norm of the config's kind over rows of `size` numbers."""
    if config.norm == "layer":
        return nn.LayerNorm(size, config.norm_eps)
    kind = PlusOneRMSNorm if config.norm == "rms_plus_one" else RMSNorm
    return kind(size, config.norm_eps)


class _Normalise(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and h = r x: y = w h, dw = sum(g h), dx = r (w g - h mean(w g h)).

    Keeps x and r only, and takes about 60 % of the time of autograd through `F.rms_norm` on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (length.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        wide = weight.float()
        normalised = x * inverse
        product = grad * normalised
        mean = (product @ wide).unsqueeze(-1) / x.shape[-1]
        grad_x = (grad * wide).sub_(normalised.mul_(mean)).mul_(inverse)
        return grad_x.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None
