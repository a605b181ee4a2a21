"""Which tensors a Hugging Face file holds, and how our parameters lie in them: alone, several in one, transposed.

Load and save both go by this. Knows nothing of files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.hf.families import FAMILIES, hf_name
from meshift.models.hf.family import name_template
from meshift.models.shards import shard_table


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a file: our parameters (name -> shape) joined along their first dim, perhaps transposed.

    Example: phi-3's `gate_up_proj` holds `layers.0.mlp.gate.weight` above `layers.0.mlp.up.weight`.
    """

    parts: Mapping[str, tuple[int, ...]]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        first, *rest = self.parts.values()
        whole = (first[0] + sum(shape[0] for shape in rest), *first[1:])
        return whole[::-1] if self.transposed else whole

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our name -> its part, a view of the stored tensor."""
        whole = tensor.T if self.transposed else tensor
        sizes = [shape[0] for shape in self.parts.values()]
        return dict(zip(self.parts, whole.split(sizes), strict=True))

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The tensor to store, of our parameters by name; contiguous."""
        parts = [parameters[name].detach() for name in self.parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (whole.T if self.transposed else whole).contiguous()


def stored_tensors(config: DecoderConfig, head: HeadKind) -> dict[str, Stored]:
    """Their name -> what the tensor holds, in the order of the shard table."""
    family = FAMILIES[config.family]
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    transposed = set()
    for name, shard in shard_table(config, head).items():
        theirs = hf_name(config, head, name)
        parts.setdefault(theirs, {})[name] = shard.shape
        if len(shard.shape) == 2 and name_template(name)[0] in family.transposed:
            transposed.add(theirs)
    return {theirs: Stored(parts=held, transposed=theirs in transposed) for theirs, held in parts.items()}
