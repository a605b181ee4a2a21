"""Measures the machine: matrix products at the model's shapes, a streaming read, a copy.

`python -m benchmarks.roofline`, asked over stdin. The best of torch's memory layouts and of Meshift's own kernels,
since a limit should be hard to beat.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import Shape
from benchmarks.serve import Reply, serve
from meshift.kernels.cpu import Kernels, products_for

MIN_SECONDS = 0.25
"""Each figure is a median over repetitions that fill this time, three at least."""
STREAM_BYTES = 512 * 2**20
SWEEP_FLOPS = 4e10
Product = Callable[[Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Roofline:
    """Answers with all figures at once."""

    def start(self, *, config: dict[str, Any], rows: list[int], train_rows: int) -> Reply:
        """FLOP/s by compute type and row count, of training, and bytes/s."""
        shape = Shape.of(config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gemm, train = {}, {}
        for name, dtype in DTYPES.items():
            products = Products(shape, dtype, device)
            gemm[name] = {str(n): products.forward_rate(n) for n in rows}
            train[name] = products.training_rate(train_rows)
            del products
        return {"gemm": gemm, "train_gemm": train, **memory_rates(device)}


class Products:
    """The model's matrices, as many as it has, so that a sweep finds each as cold as a forward pass does.

    Where that is much work, a part of the layers and the same part of the head's rows stand for all of them: with
    many rows the products are long enough for cold weights not to matter.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        sizes = [size for _ in range(shape.num_layers) for size in shape.matrices]
        self.layers = [torch.randn(n_out, n_in, dtype=dtype, device=device) for n_in, n_out in sizes]
        self.head = torch.randn(shape.vocab_size, shape.hidden_size, dtype=dtype, device=device)

    def forward_rate(self, num_rows: int) -> float:
        """FLOP/s of x W^T: W as it is stored, transposed in memory, or in oneDNN's order, whichever is fastest."""
        weights = self.part(num_rows)
        widths = {w.shape[1] for w in weights}
        inputs = {n: torch.randn(num_rows, n, dtype=self.dtype, device=self.device) for n in widths}
        seconds = [
            timed(partial(_sweep, weights, inputs, layout), self.device)
            for layout in self._layouts(weights, num_rows)
        ]
        return 2.0 * sum(w.numel() for w in weights) * num_rows / min(seconds)

    def part(self, num_rows: int) -> list[Tensor]:
        """As many layers as `SWEEP_FLOPS` allow, one at least, and the head in proportion."""
        whole = self.shape.num_body + self.shape.num_head
        num_layers = self.shape.num_layers
        kept = max(1, min(num_layers, int(num_layers * SWEEP_FLOPS / (2.0 * whole * num_rows))))
        return [*self.layers[: 4 * kept], self.head[: self.shape.vocab_size * kept // num_layers]]

    def training_rate(self, num_rows: int) -> float:
        """FLOP/s of a layer's products forward, to the inputs' and to the weights' gradients: the best way's."""
        layer = self.layers[:4]
        inputs = [torch.randn(num_rows, w.shape[1], dtype=self.dtype, device=self.device) for w in layer]
        grads = [torch.randn(num_rows, w.shape[0], dtype=self.dtype, device=self.device) for w in layer]
        triples = zip(grads, inputs, layer, strict=True)
        outs = [(torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)) for g, x, w in triples]

        def sweep() -> None:
            for w, x, g, (y, dx, dw) in zip(layer, inputs, grads, outs, strict=True):
                torch.mm(x, w.t(), out=y)
                torch.mm(g, w, out=dx)
                torch.mm(g.t(), x, out=dw)

        found = products_for(layer[0])
        sums = [torch.zeros(w.shape, device=self.device) for w in layer]

        def sweep_by_meshift() -> None:
            assert found is not None
            for w, x, g, (y, dx, _), total in zip(layer, inputs, grads, outs, sums, strict=True):
                found.product(x, found.pack_here(w), out=y)
                found.product(g, found.pack_transposed(w), out=dx)
                found.add_weight_gradients(g, x, [total])

        ways = [sweep] if found is None else [sweep, sweep_by_meshift]
        return 6.0 * sum(w.numel() for w in layer) * num_rows / min(timed(way, self.device) for way in ways)

    def _layouts(self, weights: Sequence[Tensor], num_rows: int) -> list[list[Product]]:
        """Ways to multiply: each is one function per matrix."""
        stored = [_product(w.t()) for w in weights]
        transposed = [_product(w.t().contiguous()) for w in weights]
        packed = self._packed(weights, num_rows)
        ours = self._by_meshift(weights)
        return [stored, transposed, *([packed] if packed else []), *([ours] if ours else [])]

    def _by_meshift(self, weights: Sequence[Tensor]) -> list[Product] | None:
        """Meshift's own kernels, where there are any: a limit that they pass would be none."""
        found = products_for(weights[0])
        return None if found is None else [_kernel_product(found, w) for w in weights]

    def _packed(self, weights: Sequence[Tensor], num_rows: int) -> list[Product] | None:
        """oneDNN's own order of the weights, where torch offers it."""
        if self.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return None
        reorder = torch.ops.mkldnn._reorder_linear_weight
        try:
            packed = [reorder(w.to_mkldnn(), num_rows) for w in weights]
        except RuntimeError:  # not every build packs every type
            return None
        return [_packed_product(torch.ops.mkldnn._linear_pointwise, w) for w in packed]


def _sweep(weights: Sequence[Tensor], inputs: dict[int, Tensor], layout: Sequence[Product]) -> None:
    for weight, multiply in zip(weights, layout, strict=True):
        multiply(inputs[weight.shape[1]])


def _product(weight: Tensor) -> Product:
    """A product into memory that is kept, as a careful program would."""
    kept: dict[int, Tensor] = {}

    def multiply(x: Tensor) -> Tensor:
        if x.shape[0] not in kept:
            kept[x.shape[0]] = x.new_empty(x.shape[0], weight.shape[1])
        return torch.mm(x, weight, out=kept[x.shape[0]])

    return multiply


def _kernel_product(found: Kernels, weight: Tensor) -> Product:
    packed = found.pack(weight)
    kept: dict[int, Tensor] = {}

    def multiply(x: Tensor) -> Tensor:
        if x.shape[0] not in kept:
            kept[x.shape[0]] = x.new_empty(x.shape[0], weight.shape[0])
        return found.product(x, packed, out=kept[x.shape[0]])

    return multiply


def _packed_product(linear: Callable[..., Tensor], weight: Tensor) -> Product:
    return lambda x: linear(x, weight, None, "none", [], "")


def memory_rates(device: torch.device) -> Reply:
    """Bytes/s of a streaming read (the faster of a sum and of a matrix-vector product) and of a copy, which reads
    and writes."""
    matrix = torch.ones(STREAM_BYTES // 4 // 4096, 4096, device=device)
    vector, target = torch.ones(4096, device=device), torch.empty_like(matrix)
    reads = min(timed(matrix.sum, device), timed(lambda: matrix @ vector, device))
    copy = timed(lambda: target.copy_(matrix), device)
    return {"bandwidth": STREAM_BYTES / reads, "copy": 2 * STREAM_BYTES / copy}


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after one that is dropped."""
    seconds: list[float] = []
    for number in range(1_000_000):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            seconds.append(time.perf_counter() - started)
        if len(seconds) >= 3 and sum(seconds) >= MIN_SECONDS:
            break
    return median(seconds)


def main() -> None:
    """Serve."""
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", torch.get_num_threads())))
    with torch.inference_mode():
        serve(Roofline(), packages=("torch",))


if __name__ == "__main__":
    main()
