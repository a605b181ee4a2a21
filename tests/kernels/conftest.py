"""The kernels, where this machine has them, and the program without them."""

import shutil
import sys

import pytest
import torch

from meshift.kernels import cpu as module
from meshift.kernels.build import COMPILERS, unsupported
from meshift.kernels.cpu import Kernels, built, kernels, products_for
from meshift.kernels.matrix_products import ProductKernels

GIVES_KERNELS = ("kernels", "kernels_for", "products_for")


@pytest.fixture(scope="session")
def cpu() -> Kernels:
    """Skips the test where there are none, and says why."""
    found = kernels()
    if found is None:
        skip_or_fail()
    return found


def skip_or_fail() -> None:
    """Skip where kernels cannot be; kernels that should be there and could not be built are an error."""
    if unsupported() or not any(map(shutil.which, COMPILERS)):
        pytest.skip(built().fault)
    pytest.fail(built().fault)


@pytest.fixture(scope="session")
def multiplies(cpu: Kernels) -> None:
    """Skips the test where models multiply by torch's kernels all the same."""
    if products_for(torch.zeros(1, dtype=torch.bfloat16)) is None:
        pytest.skip("this processor multiplies faster by torch's kernels")


@pytest.fixture
def switch_off(monkeypatch: pytest.MonkeyPatch):
    """`switch_off()` takes the kernels from every module that asks for them, until the test ends."""

    def switch() -> None:
        asked = [getattr(module, name) for name in GIVES_KERNELS]
        users = [found for name, found in list(sys.modules.items()) if name.startswith("meshift.")]
        for user in users:
            for name in GIVES_KERNELS:
                if getattr(user, name, None) in asked:
                    monkeypatch.setattr(user, name, lambda *tensor: None)

    return switch


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch):
    """`count_calls()` gives a mapping that counts, by method, what is asked of the kernels from then on."""

    def begin() -> dict[str, int]:
        calls: dict[str, int] = {}

        def watch(name: str, method) -> None:
            def counted(*given, **named):
                calls[name] = calls.get(name, 0) + 1
                return method(*given, **named)

            monkeypatch.setattr(Kernels, name, counted)

        methods = vars(ProductKernels) | vars(Kernels)
        for name, method in methods.items():
            if not name.startswith("_"):
                watch(name, method)
        return calls

    return begin
