"""Tensors in files, whole or in boxes that several processes wrote: checkpoints, read box by box by any layout.

A file `state.safetensors` has whole tensors. `state-<n>.safetensors` has boxes of them; its header says which, and
of what shape the whole is. It knows nothing of what the tensors mean or of who wrote which box.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meshift.errors import CheckpointError
from meshift.layout.boxes import Box, num_elements, shape_of

WHOLE, PARTS, BOXES = "state.safetensors", "state-*.safetensors", "boxes"
Shape = tuple[int, ...]
Part = Callable[[str, Shape], Box]
"""From a tensor's name and whole shape to the box of it that is wanted."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A box of a tensor in an open file."""

    file: Any
    box: Box


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder by name; `part` says which box of each is read (None: all of it).

    Raises `CheckpointError` where a file cannot be read, or where the files have not all of a box.
    """

    def __init__(self, folder: Path, part: Part | None = None) -> None:
        self.folder, self.part = folder, part
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, Shape] = {}
        for path in [*folder.glob(WHOLE), *sorted(folder.glob(PARTS))]:
            try:
                self._open(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())})") from error

    def __getitem__(self, name: str) -> Tensor:
        """The tensor's box that is wanted, in memory of its own."""
        shape = self._shapes[name]
        box = tuple((0, size) for size in shape) if self.part is None else self.part(name, shape)
        found: Tensor | None = None
        num_read = 0
        for piece in self._pieces[name]:
            shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True))
            if any(stop <= start for start, stop in shared):
                continue
            data = self._read(name, piece, shared)
            num_read += data.numel()
            if shared == box:
                return data
            found = torch.empty(shape_of(box), dtype=data.dtype) if found is None else found
            found[_within(shared, box)] = data
        if found is None and num_elements(box) == 0:  # a rank may hold no row at all
            return self._read(name, self._pieces[name][0], None)[tuple(slice(0, 0) for _ in box)].reshape(
                shape_of(box)
            )
        if found is None or num_read != num_elements(box):
            there = 0 if found is None else num_read
            raise CheckpointError(
                f"{self.folder} has {there} of the {num_elements(box)} numbers of {name} that are wanted: a file "
                "of it is missing, or is not its own"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _open(self, path: Path) -> None:
        file = safe_open(path, framework="pt")
        boxes = json.loads((file.metadata() or {}).get(BOXES, "{}"))
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            written = boxes.get(name)
            if written is None:
                shape = tuple(file.get_slice(name).get_shape())
                box = tuple((0, size) for size in shape)
            else:
                shape, box = tuple(written["shape"]), tuple((start, stop) for start, stop in written["box"])
            if self._shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{name} is of another shape than in a file beside it")
            self._pieces.setdefault(name, []).append(_Piece(file=file, box=box))

    def _read(self, name: str, piece: _Piece, box: Box | None) -> Tensor:
        try:
            if box is None or not box:
                data: Tensor = piece.file.get_tensor(name)
            else:
                data = piece.file.get_slice(name)[_within(box, piece.box)]
        except SafetensorError as error:
            raise CheckpointError(f"{name} in {self.folder} cannot be read ({error})") from error
        return data


def write_boxes(
    folder: Path, number: int, tensors: Mapping[str, Tensor], boxes: Mapping[str, tuple[Box, Shape]]
) -> None:
    """Write one process's boxes; `boxes` has each tensor's box and the whole's shape. Raises `OSError`."""
    written = {name: {"box": box, "shape": shape} for name, (box, shape) in boxes.items()}
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / PARTS.replace("*", f"{number:05d}"),
            metadata={BOXES: json.dumps(written)},
        )
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in one that contains it."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))
