"""Hugging Face folders and hub ids in: a filled `Decoder`, or a tokenizer.

Knows nothing of `pypi:` names, of layouts or of our own checkpoints; the layers above resolve those.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meshift.counted import counted
from meshift.errors import ModelError
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.decoder import Decoder
from meshift.models.hf.adapter_files import AdaptedWeights, find_adapter
from meshift.models.hf.families import FAMILIES, HEAD_NAMES, read_config
from meshift.models.hf.files import WeightFiles, read_json, resolve_model
from meshift.models.hf.stored import Stored, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
Files = WeightFiles | AdaptedWeights
PROBE = "The film, on the whole, was good: 10/10.\n"


def load_model(
    name_or_path: str | Path,
    *,
    head: HeadKind = "lm",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mapped: bool = False,
) -> Decoder:
    """A `Decoder` filled from a local folder or a hub id; of an adapter's, the base model with it merged in.

    `dtype` None keeps the stored one (the embedding's, should the file mix several). A head that the checkpoint
    does not hold starts at zero (value) or is drawn from `seed` with std 1 / sqrt(hidden + 1) (reward; Stiennon
    et al. 2020, arXiv:2009.01325). With `mapped`, parameters that are stored in `dtype` stay in the mapped files
    on a CPU, for whoever copies a part of them at once; the others are in memory. Raises `ModelError`.
    """
    directory = resolve_model(name_or_path)
    config = load_config(directory)
    files = open_weights(directory)
    stored = _stored_here(config, head, files)
    fresh = _check(config, head, stored, files)
    with torch.device("meta"):
        model = Decoder(config, head)
    tensors = _read(files, {n: held for n, held in stored.items() if n not in fresh}, dtype, mapped=mapped)
    if fresh:
        kept = tensors["embedding.weight"].dtype
        tensors["head.weight"] = _new_head(config, head, seed).to(kept)
    _assign(model, tensors, torch.device(device))
    return model


def check_weights(directory: Path, head: HeadKind) -> None:
    """Raise `ModelError` where `load_model` would; reads config.json and the headers of the weights only."""
    config, files = load_config(directory), open_weights(directory)
    _check(config, head, _stored_here(config, head, files), files)


def load_config(directory: Path) -> DecoderConfig:
    """The decoder's numbers from a folder's config.json, or from an adapter's base. Raises `ModelError`."""
    adapter = find_adapter(directory)
    if adapter is not None:
        config = load_config(adapter.model)
        classifier = {**config.hf, "architectures": [FAMILIES[config.family].classifier]}
        return replace(config, hf=classifier) if adapter.has_score else config
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return read_config(
        raw, str(directory / "config.json"), read_json(generation) if generation.is_file() else None
    )


def open_weights(directory: Path) -> Files:
    """The tensors of a model's folder, or of an adapter's with those of its base. Raises `ModelError`."""
    adapter = find_adapter(directory)
    if adapter is None:
        return WeightFiles(directory)
    return AdaptedWeights(adapter, open_weights(adapter.model), load_config(adapter.model))


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local folder or a hub id. Raises `ModelError`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    directory = tokenizer_folder(resolve_model(name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        tokenizer.decode(tokenizer.encode(PROBE))  # what is wrong in a file may show only here
        tokenizer.eos_token_id, tokenizer.pad_token_id  # noqa: B018 - a token that is not there is looked up for ever
        return tokenizer
    except StrictDataclassError as error:
        raise ModelError(
            f"{directory / 'config.json'} has a value of the wrong type ({' '.join(str(error).split())}): copy "
            "the file from its source again."
        ) from error
    except BaseException as error:
        # A file that holds JSON of another shape fails wherever it is first used; in Rust, as a plain Exception or
        # as a panic, whose class can be told by its name only.
        known = isinstance(error, (*UNREADABLE, RecursionError)) or type(error) is Exception
        if not known and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{directory} holds no tokenizer that transformers can read ({type(error).__name__}): copy "
            "tokenizer.json and tokenizer_config.json of the model into it."
        ) from error


def tokenizer_folder(directory: Path) -> Path:
    """Where the tokenizer of a model's folder is: of an adapter's that holds none, with its base."""
    adapter = find_adapter(directory)
    if adapter is None or (directory / "tokenizer_config.json").is_file():
        return directory
    return tokenizer_folder(adapter.model)


def _stored_here(config: DecoderConfig, head: HeadKind, files: Files) -> dict[str, Stored]:
    """What the files must hold, by the names there: a bare decoder's lack the prefix, as GPT-2's first ones do."""
    stored, prefix = stored_tensors(config, head), FAMILIES[config.family].prefix
    bare = {name.removeprefix(prefix): held for name, held in stored.items()}
    return max(stored, bare, key=lambda names: len(names.keys() & files.shapes.keys()))


def _check(config: DecoderConfig, head: HeadKind, stored: Mapping[str, Stored], files: Files) -> frozenset[str]:
    """Hold the files against what they must store; returns the head's name if it has to be made new."""
    missing = sorted(set(stored) - set(files.shapes))
    fresh = frozenset(missing) & {HEAD_NAMES["value"]}
    if fresh and FAMILIES[config.family].classifier in (config.hf.get("architectures") or ()):
        fresh = frozenset()  # a reward model without its head is torn, not new
    if set(missing) - fresh:
        _complain_of_missing(files, [name for name in missing if name not in fresh])
    _check_unexpected(config, set(stored), files)
    _check_shapes(stored, files)
    if head == "lm" and config.tie_word_embeddings and HEAD_NAMES["lm"] in files.shapes:
        _check_tie(next(name for name, held in stored.items() if "embedding.weight" in held.parts), files)
    return fresh


def _complain_of_missing(files: Files, missing: list[str]) -> None:
    if missing == [HEAD_NAMES["lm"]]:
        raise ModelError(
            f"{files.directory} holds no {HEAD_NAMES['lm']}, and its config does not tie it to the embedding: "
            "it is no language model (a reward model or a critic?), so load it with another head."
        )
    raise ModelError(
        f"{files.directory} lacks the tensor {missing[0]}{_and_more(missing)}, which its config.json calls for."
    )


def _check_unexpected(config: DecoderConfig, known: set[str], files: Files) -> None:
    # Another head's weights are left where they are: a language model may start a critic and the reverse.
    pattern = FAMILIES[config.family].ignored
    extra = set(files.shapes) - known - set(HEAD_NAMES.values())
    unexpected = sorted(name for name in extra if not re.fullmatch(pattern, name))
    if unexpected:
        raise ModelError(
            f"{files.directory} holds the tensor {unexpected[0]}{_and_more(unexpected)}, which its "
            "config.json has no place for: the config and the weights are not of one model."
        )


def _check_shapes(stored: Mapping[str, Stored], files: Files) -> None:
    for name, held in stored.items():
        found = files.shapes.get(name, held.shape)
        if found != held.shape:
            raise ModelError(
                f"{files.directory}: the tensor {name} is {list(found)}, but config.json calls for "
                f"{list(held.shape)}: the config and the weights are not of one model."
            )


def _check_tie(embedding: str, files: Files) -> None:
    """A tied model's file may repeat the embedding as lm_head, but not contradict it."""
    stored = dict(files.read([embedding, HEAD_NAMES["lm"]]))
    if not torch.equal(stored[embedding], stored[HEAD_NAMES["lm"]]):
        raise ModelError(
            f"{files.directory}: config.json ties the head to the embedding, but {HEAD_NAMES['lm']} differs "
            f"from {embedding}: set tie_word_embeddings to false if the weights are right."
        )


def _read(
    files: Files, stored: Mapping[str, Stored], dtype: torch.dtype | None, *, mapped: bool = False
) -> dict[str, Tensor]:
    """Our name -> a tensor that owns its memory unless it is `mapped`, all of one dtype."""
    tensors: dict[str, Tensor] = {}
    found = counted(files.read(stored), f"tensors of {files.directory}", lambda: len(stored))
    for name, tensor in found:
        for ours, part in stored[name].split(tensor).items():
            tensors[ours] = part.to(dtype or part.dtype) if mapped else _copy(part, dtype)
    kept = dtype or tensors["embedding.weight"].dtype
    return {name: tensor.to(kept) for name, tensor in tensors.items()}


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Contiguous, and free of the mapped file: overwriting that file must not change a live model."""
    return tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def _new_head(config: DecoderConfig, head: HeadKind, seed: int) -> Tensor:
    """Fresh scalar head [1, hidden] in fp32."""
    if head == "value":
        return torch.zeros(1, config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.hidden_size, generator=generator) * (config.hidden_size + 1) ** -0.5


def _assign(model: Decoder, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put each tensor in the place of its meta parameter."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(tensor.to(device)))


def _and_more(names: Iterable[str]) -> str:
    rest = len(list(names)) - 1
    return f" (and {rest} more)" if rest else ""
