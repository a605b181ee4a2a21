"""What the device can compute at best: FLOP/s in dense products, to hold a run's own against.

Of GPUs that are named here it is the maker's figure; of a CPU, or of another GPU, it is measured, once in a
process, since a peak that rose during a run would make its steps look slower and slower. It knows nothing of
models.
"""

from __future__ import annotations

import time
from functools import cache

import torch

PEAK_BFLOAT16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}
"""Dense bfloat16, from NVIDIA's data sheets, by a part of the device's name; the first that fits."""
SIZE, SIZE_ON_GPU = 1024, 4096
"""Rows of the squares; a GPU has done the smaller ones before it is told of the next."""
MIN_PRODUCTS, SECONDS = 5, 0.3


@cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device in one type, the same whenever it is asked for.

    With torch's threads of the first time, on a CPU, where products in fp32 can be faster than in a shorter type.
    """
    return _known(device, dtype) or max(_measured(device, one) for one in dict.fromkeys((dtype, torch.float32)))


def _known(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_BFLOAT16.items() if part in name), None)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of the products of squares in a third of a second: what interrupts some of them does not count."""
    size = SIZE_ON_GPU if device.type == "cuda" else SIZE
    left = torch.ones(size, size, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    seconds: list[float] = []
    while len(seconds) < MIN_PRODUCTS or sum(seconds) < SECONDS:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
