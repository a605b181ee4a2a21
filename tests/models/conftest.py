"""Tiny random `transformers` models, saved once per session and shared by the tests that only read them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_variants import CLASSES, SIZES, VARIANTS
from transformers.utils import logging


@dataclass(frozen=True)
class Saved:
    """A `transformers` model in fp32 and the folder it was saved to."""

    folder: Path
    model: Any


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def build(name: str, kind: str, **changes: Any) -> Any:
    """A random model whose biases and norms are random too: zeros and ones would hide mistakes."""
    family, differs = VARIANTS[name]
    model_class = getattr(transformers, CLASSES[family, kind])
    labels = {"num_labels": 1} if kind == "score" else {}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**{**SIZES, **differs, **labels, **changes})
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`saved(variant, kind="lm" | "score")` -> `Saved`; the same folder each time, so read it only."""
    ready: dict[tuple[str, str], Saved] = {}

    def get(name: str, kind: str = "lm") -> Saved:
        if (name, kind) not in ready:
            model = build(name, kind)
            folder = tmp_path_factory.mktemp(f"{name}-{kind}")
            model.save_pretrained(folder)
            ready[name, kind] = Saved(folder, model)
        return ready[name, kind]

    return get
