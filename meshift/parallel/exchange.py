"""Batches and small facts between peers, as bytes in safetensors and JSON, never pickle.

Knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshift.batch import Batch
from meshift.parallel.groups import Peers


def gather_batches(own: Batch, peers: Peers) -> list[Batch]:
    """Everybody's batch, in the order of the peers. Tensors arrive on the CPU."""
    if peers.group is None:
        return [own]
    return [Batch.from_bytes(data) for data in gather_bytes(own.to_bytes(), peers)]


def gather_facts(own: Any, peers: Peers) -> list[Any]:
    """Everybody's value of JSON (numbers may be infinite or NaN), in the order of the peers."""
    if peers.group is None:
        return [own]
    return [json.loads(data) for data in gather_bytes(json.dumps(own).encode(), peers)]


def gather_bytes(own: bytes, peers: Peers) -> list[bytes]:
    """Everybody's bytes; they may be of any length. They travel padded to the longest."""
    device = group_device(peers)
    size = torch.tensor([len(own)], dtype=torch.int64, device=device)
    sizes = [int(one) for one in _gathered(size, peers)]
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else 0
    everyone = _gathered(padded.to(device), peers)
    return [bytes(one[:size].cpu().numpy()) for one, size in zip(everyone, sizes, strict=True)]


def _gathered(own: Tensor, peers: Peers) -> Sequence[Tensor]:
    everyone = [torch.empty_like(own) for _ in range(len(peers))]
    dist.all_gather(everyone, own, group=peers.group)
    return peers.in_order(everyone)


def group_device(peers: Peers) -> torch.device:
    """Where the group's backend wants its tensors."""
    return torch.device("cuda" if dist.get_backend(peers.group) == "nccl" else "cpu")
