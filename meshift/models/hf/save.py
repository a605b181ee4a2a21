"""A `Decoder` out, as a plain Hugging Face folder that `transformers` loads.

An unmodified model comes out bit for bit as it was read. Knows nothing of our own checkpoints or of layouts.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from meshift.counted import counted
from meshift.errors import ModelError, SaveError
from meshift.models.decoder import Decoder
from meshift.models.hf.adapter_files import CONFIG as ADAPTER_CONFIG
from meshift.models.hf.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from meshift.models.hf.adapter_files import adapter_settings, adapter_tensors
from meshift.models.hf.families import FAMILIES
from meshift.models.hf.files import INDEX, SINGLE
from meshift.models.hf.stored import Stored, stored_tensors
from meshift.models.shards import shard_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_BYTES = 5 * 10**9
CLASSIFIER_KEYS = ("num_labels", "id2label", "label2id", "problem_type")


def save_model(
    model: Decoder,
    directory: Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, safetensors (several with an index above `max_shard_bytes`) and the tokenizer's files.

    Everything is written aside and then renamed, so a new folder appears whole or not at all. In a folder that
    exists, old weights go first and config.json comes last: broken off midway it lacks weights, and never mixes
    two models. Other files there stay. Raises `SaveError` where the folder cannot be written.
    """
    with _written_aside(directory) as aside:
        stored = stored_tensors(model.config, model.head_kind)
        _write_weights(aside, stored, _parameters(model), max_shard_bytes)
        if tokenizer is not None:
            with _SystemErrors():
                tokenizer.save_pretrained(str(aside))
        if model.head_kind == "lm" and model.config.generation is not None:
            _write_json(aside / "generation_config.json", model.config.generation)
        _write_json(aside / "config.json", output_config(model, tokenizer))


def save_adapter(model: Decoder, directory: Path, *, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """Write a model's adapters in PEFT's format, and the tokenizer's files; as whole and safe as `save_model`."""
    with _written_aside(directory) as aside:
        save_file(adapter_tensors(model), aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            with _SystemErrors():
                tokenizer.save_pretrained(str(aside))
        _write_json(aside / ADAPTER_CONFIG, adapter_settings(model))


class _SystemErrors:
    """Makes an `OSError` of the plain `Exception` that `tokenizers` raises where a file cannot be written."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        number = re.search(r"\(os error (\d+)\)", str(error)) if kind is Exception else None
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def _written_aside(directory: Path) -> Iterator[Path]:
    """A folder to be filled, and then put in the place of `directory`. Raises `SaveError`."""
    aside = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _move_into_place(aside, directory)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"The model could not be saved to {directory} ({error}): check the path, its permissions and the free "
            "space."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def output_config(model: Decoder, tokenizer: "PreTrainedTokenizerBase | None" = None) -> dict[str, Any]:
    """The raw config.json the model came with, with what its head and dtype now call for."""
    config = dict(model.config.hf)
    family = FAMILIES[model.config.family]
    config["dtype" if "torch_dtype" not in config else "torch_dtype"] = _dtype_name(model)
    if model.head_kind == "lm":
        if config.get("architectures") == [family.classifier]:
            config = {key: value for key, value in config.items() if key not in CLASSIFIER_KEYS}
        return {**config, "architectures": [family.causal]}
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    # transformers scores the last token that is no padding, and refuses batches where it cannot tell.
    padding = {"pad_token_id": _padding(config, tokenizer)}
    return {**config, "architectures": [family.classifier], **labels, **padding}


def _padding(config: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase | None") -> int | None:
    """The config's padding token, else the tokenizer's, else the (first) end-of-sequence token."""
    if config.get("pad_token_id") is not None:
        return config["pad_token_id"]
    if tokenizer is not None and tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = config.get("eos_token_id")
    return end[0] if isinstance(end, list) else end


def _dtype_name(model: Decoder) -> str:
    return str(model.embedding.weight.dtype).removeprefix("torch.")


def _parameters(model: Decoder) -> dict[str, Tensor]:
    """The parameters by our names, held against the shard table."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    table = shard_table(model.config, model.head_kind)
    if {name: tuple(p.shape) for name, p in parameters.items()} != {n: s.shape for n, s in table.items()}:
        raise ModelError("The model's parameters no longer match its config, so it cannot be saved.")
    return parameters


def _write_weights(
    directory: Path, stored: Mapping[str, Stored], parameters: Mapping[str, Tensor], max_shard_bytes: int
) -> None:
    """Tensors are put together file by file, so that a fused one is there twice no longer than it must."""
    num_bytes = {name: sum(parameters[part].nbytes for part in held.parts) for name, held in stored.items()}
    groups = list(_groups(num_bytes, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(counted(groups, "files written", lambda: len(groups)), start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        content = {name: stored[name].join(parameters).cpu() for name in names}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(num_bytes.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _groups(num_bytes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many to a file as fit; a tensor larger than a file has one to itself."""
    group: list[str] = []
    size = 0
    for name, added in num_bytes.items():
        if group and size + added > max_shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += added
    yield group


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into_place(aside: Path, directory: Path) -> None:
    if not directory.exists():
        aside.rename(directory)
        return
    for old in [directory / INDEX, *directory.glob("model*.safetensors")]:
        old.unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=_arrival):
        os.replace(path, directory / path.name)


def _arrival(path: Path) -> int:
    """Weights, then the index that makes them count, then config.json."""
    return 2 if path.name in ("config.json", ADAPTER_CONFIG) else 1 if path.name == INDEX else 0
