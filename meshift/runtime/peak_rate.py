"""What the device can compute at best: FLOP/s in dense products, to hold a run's own against.

Of GPUs that are named here it is the maker's figure; of a CPU, or of another GPU, it is measured, in a tenth of a
second. It knows nothing of models.
"""

from __future__ import annotations

import time
from functools import cache

import torch

PEAK_BFLOAT16 = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16, from NVIDIA's data sheets, by a part of the device's name; the first that fits."""
SIZE, NUM_PRODUCTS = 1024, 12


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """FLOP/s. `num_threads` is torch's: what is measured on a CPU holds for so many."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [rate for part, rate in PEAK_BFLOAT16.items() if part in name]
        if known:
            return known[0]
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several products of squares: what interrupts one of them does not count."""
    left = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    seconds = []
    for _ in range(NUM_PRODUCTS):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * SIZE**3 / min(seconds)
