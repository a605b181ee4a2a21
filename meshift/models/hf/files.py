"""The weights of a Hugging Face folder as named tensors, read from safetensors one at a time.

Knows nothing of families or of our parameter names. Pickled weights are never read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from meshift.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `ModelError` where it is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}, so it is no Hugging Face model folder.") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); copy it from its source again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a model: a local folder whenever it exists, else a hub id, downloaded or from the cache.

    Raises `ModelError` where there is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; give the folder that holds config.json and the safetensors.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(HUB_FILES)))
    # OSError covers no network, no such repository and no access (requests' and the hub's own errors).
    except (HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"'{name_or_path}' is no local folder and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): "
            "check the spelling, the network and `hf auth login`, or give a local folder."
        ) from error


class WeightFiles:
    """Which tensors a folder holds, with their shapes, before a byte of them is read.

    `shapes` maps a tensor's name to its shape; `read(names)` yields (name, tensor) file by file.
    Raises `ModelError` for a folder without safetensors, a missing shard and a torn file.
    """

    def __init__(self, directory: Path, files: Sequence[Path] | None = None) -> None:
        """All of the folder's weights, or only these `files` of it."""
        self.directory = directory
        self._files = _locate(directory) if files is None else list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._files:
            for name, shape in _header(path).items():
                self.shapes[name] = shape
                self._file_of[name] = path

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors on the CPU that still lie in the mapped file: copy what is to be kept."""
        wanted = set(names)
        for path in self._files:
            here = [name for name in wanted if self._file_of[name] == path]
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in here:
                    yield name, file.get_tensor(name)


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a file's header."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing, though {INDEX} names it: the model is incomplete, so fetch it again."
        ) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is torn or no safetensors file ({error}); fetch or save it again.") from error


def _locate(directory: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise ModelError(f"{directory / INDEX} lacks the key 'weight_map'; fetch the model again.")
        return [directory / name for name in sorted(set(weight_map.values()))]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{directory} holds only pickled weights (pytorch_model.bin), which can run code and are not "
            "read: convert them with transformers' from_pretrained(folder).save_pretrained(folder), which writes "
            "safetensors."
        )
    raise ModelError(f"{directory} holds neither {SINGLE} nor {INDEX}, so there are no weights to load.")
