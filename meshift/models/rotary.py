"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the scalings of Hugging Face configs.

Frequencies come from `transformers`; the rotation is ours. Knows nothing of layers or sequences.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from meshift.errors import ModelError
from meshift.models.config import DecoderConfig

# These scalings pick their frequencies by the longest sequence in the batch. Beyond the original length a
# token's logprob would then depend on its neighbours in the batch, so that length is a hard limit.
LENGTH_DEPENDENT = ("dynamic", "longrope")

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of some rows."""


class Rotary(nn.Module):
    """Turns positions into cosines and sines, computed in fp32.

    `layer_type` names the entry of the config's `rope_parameters` where layers differ (None: they do not). The
    frequencies are no buffer on purpose: `model.to(torch.bfloat16)` would round them.
    """

    def __init__(self, config: DecoderConfig, layer_type: str | None = None) -> None:
        super().__init__()
        with torch.device("cpu"):  # also while the model itself is built on the meta device
            self.inv_freq, self.attention_factor, self.limit = _frequencies(config, layer_type)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Positions int64 [T] -> cosine and sine, each [T, 1, turned / 2] in `dtype`; turned: dims of a head.

        Raises `ModelError` where a length-dependent scaling would leave its original length.
        """
        if self.limit is not None:
            self._check(positions)
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions.unsqueeze(-1).float() * self.inv_freq
        cosine, sine = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return cosine.to(dtype).unsqueeze(1), sine.to(dtype).unsqueeze(1)

    def _check(self, positions: Tensor) -> None:
        longest = int(positions.max()) + 1 if positions.numel() else 0
        if self.limit is not None and longest > self.limit:
            raise ModelError(
                f"A sequence has {longest} tokens, but this model's rotary scaling (dynamic or longrope) is "
                f"supported up to its original length of {self.limit}: shorten prompts or completions."
            )


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [T, heads, head_dim] by the angles of `Rotary`: the first half of the dims pairs with the second.

    Where the angles are for fewer dims than a head has, the last ones stay as they are.
    """
    turned = 2 * cosine.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cosine, sine), x[..., turned:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def doubled(angles: Angles) -> Angles:
    """Angles as `turn_` takes them: [T, 1, turned] each, the sine's first half negative."""
    cosine, sine = angles
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def turn_(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """`rotate` in place, by `doubled` angles: three kernels where that takes seven. Has no gradient."""
    part = x[..., : cosine.shape[-1]]
    swapped = part.roll(cosine.shape[-1] // 2, dims=-1)
    part.mul_(cosine).addcmul_(swapped, sine)


def longest_sequence(config: DecoderConfig) -> int:
    """How many tokens a sequence may have: the config's positions, or less where its scaling sets a hard limit.

    Raises `ModelError` where the rotary settings cannot be read.
    """
    limits = [_frequencies(config, kind)[2] for kind in config.rotary_kinds]
    return min([config.max_positions, *(limit for limit in limits if limit is not None)])


_Frequencies = tuple[Tensor, float, int | None]


def _frequencies(config: DecoderConfig, layer_type: str | None) -> _Frequencies:
    """As `_read_frequencies`, with one sentence for whatever `transformers` and arithmetic say of bad values."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return _read_frequencies(config, layer_type)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        problem = " ".join(str(error).split())[:300]  # transformers may list every model it knows
        raise ModelError(
            f"The model's config.json cannot be read ({type(error).__name__}: {problem}): correct that key, or "
            "copy the file from its source; rotary settings are rope_theta and rope_scaling (or rope_parameters)."
        ) from error


def _read_frequencies(config: DecoderConfig, layer_type: str | None) -> _Frequencies:
    """Inverse frequencies fp32 [turned / 2], the factor on cosine and sine, the longest length allowed."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Copied deeply, since transformers writes into nested mappings.
    hf = AutoConfig.for_model(**{**deepcopy(dict(config.hf)), "head_dim": config.head_dim})
    parameters = getattr(hf, "rope_parameters", None) or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    turned = _turned_dims(config, parameters)
    if kind == "default":
        exponents = torch.arange(0, turned, 2, dtype=torch.float32) / turned
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0, None
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise ModelError(f"The rotary scaling '{kind}' in config.json is not known; supported are {known}.")
    one_of_several = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf, device=torch.device("cpu"), **one_of_several)
    limit = None
    if kind in LENGTH_DEPENDENT:
        limit = parameters.get("original_max_position_embeddings", config.max_positions)
    if len(frequencies) * 2 != turned:
        raise ModelError(
            "The config's partial_rotary_factor rotates a part of each head, which this family does not support."
        )
    return frequencies, factor, limit


def _turned_dims(config: DecoderConfig, parameters: Mapping[str, Any]) -> int:
    """How many dims of each head are turned. Raises `ModelError` where they do not pair."""
    if not config.partial_rotary:
        return config.head_dim
    turned = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
    if turned % 2 or not 0 < turned <= config.head_dim:
        raise ModelError(
            f"The config's partial_rotary_factor turns {turned} of the {config.head_dim} dims of a head; it must "
            "be an even number of them, from 2 up."
        )
    return turned
