"""What the device can compute at best: FLOP/s in dense products, to hold a run's own against.

Of GPUs that are named here it is the maker's figure; of a CPU, or of another GPU, it is measured, again and again,
since other work may slow a measurement, but in a small part of the time only. It knows nothing of models.
"""

from __future__ import annotations

import time

import torch

PEAK_BFLOAT16 = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16, from NVIDIA's data sheets, by a part of the device's name; the first that fits."""
SIZE, NUM_PRODUCTS = 1024, 5
SHARE = 0.01
"""Of the time since the first measurement, what all of them may take."""


class PeakRate:
    """FLOP/s of a device in one type: the best that was found so far, measured anew where that costs little."""

    def __init__(self) -> None:
        self._best = self._spent = 0.0
        self._began = time.perf_counter()

    def __call__(self, device: torch.device, dtype: torch.dtype) -> float:
        """With torch's threads of now, on a CPU."""
        known = _known(device, dtype)
        if known is not None:
            return known
        started = time.perf_counter()
        if self._best == 0.0 or self._spent <= SHARE * (started - self._began):
            self._best = max(self._best, _measured(device, dtype))
            self._spent += time.perf_counter() - started
        return self._best


def _known(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_BFLOAT16.items() if part in name), None)


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
