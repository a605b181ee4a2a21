"""What a part of a run (a role, an algorithm) must keep to go on bit for bit, and its files.

It knows nothing of runs, of when a checkpoint is made, or of what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from meshift.errors import CheckpointError
from meshift.training.stored_tensors import WHOLE, Part, StoredTensors

VALUES = "state.json"


@dataclass(frozen=True, kw_only=True)
class State:
    """Tensors by name, and values that JSON can write. Floats come back as the same bits: JSON has all digits."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


class Remembers(Protocol):
    """Whatever changes from step to step besides weights, as JSON: an algorithm, a controller."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""


def write_state(folder: Path, state: State) -> None:
    """Write a state into a new folder. Raises `OSError` where that cannot be done."""
    folder.mkdir()
    write_values(folder, state.values)
    if not state.tensors:
        return
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}, folder / WHOLE)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_values(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a state's values into its folder."""
    (folder / VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path, part: Part | None = None) -> State:
    """The state that a folder holds, each tensor read when it is asked for, or that `part` of it.

    Whoever wrote it, one process or several. Raises `CheckpointError` where it cannot be read.
    """
    try:
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read ({' '.join(str(error).split())})") from error
    return State(tensors=StoredTensors(folder, part), values=values)


@torch.no_grad()
def restore_tensor(target: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy `tensors[name]` into `target`. Raises `CheckpointError` where it is missing or of another shape."""
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no {name}, which the model has: it is of another model")
    if tensors[name].shape != target.shape:
        raise CheckpointError(
            f"{name} is {list(tensors[name].shape)} in the checkpoint, but {list(target.shape)} in the model: "
            "the checkpoint is of another model"
        )
    target.copy_(tensors[name])


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
