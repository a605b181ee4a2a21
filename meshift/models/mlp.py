"""The MLP, gated (Shazeer 2020, arXiv:2002.05202) or plain, and the activations configs may name."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from meshift.errors import ModelError, shown
from meshift.kernels import functions
from meshift.kernels.cpu import ACTIVATIONS as KERNEL_ACTIVATIONS
from meshift.kernels.cpu import Kernels, products_for
from meshift.models.config import DecoderConfig
from meshift.models.linear import Linear, SummedLinear, fits_kernels

# The keys are the names that Hugging Face configs use.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
    }
)


class MLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if str(config.activation) not in ACTIVATIONS:
            raise ModelError(
                f"The activation {shown(config.activation)} (hidden_act in config.json) is not supported; choose "
                f"one of {', '.join(ACTIVATIONS)}."
            )
        self.activation_name = config.activation
        self.activation = ACTIVATIONS[config.activation]
        self.gate: Linear | None = None
        if config.gated_mlp:
            self.gate = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = SummedLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        kernels = self._kernels(x)
        if kernels is not None and any(part.is_adapted for part in (self.gate, self.up, self.down)):
            return self.down(functions.gated(kernels, self.gate(x), self.up(x), self.activation_name))
        if kernels is not None:
            parts = (self.gate, self.up, self.down)
            weights, biases = [part.weight for part in parts], [part.bias for part in parts]
            return functions.gated_mlp(kernels, x, weights, biases, self.activation_name)
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def _kernels(self, x: Tensor) -> Kernels | None:
        """What does all of it at once (but for adapters), unless `down` has some of its columns only."""
        served = self.down.total is None and self.activation_name in KERNEL_ACTIVATIONS
        weights = [part.weight for part in (self.gate, self.up, self.down) if part is not None]
        return products_for(x) if served and all(map(fits_kernels, weights)) else None
