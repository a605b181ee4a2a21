"""`meshift env`: what a bug report needs to say of the machine and of what is installed.

It knows nothing of runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from meshift import __version__
from meshift.cli.command import Command
from meshift.cli.tables import print_rows

# Beside those that `run_environment` names; the second line is what the extras install.
PACKAGES = (
    *("tokenizers", "pydantic", "huggingface_hub", "tensorboard", "rich"),
    *("datasets", "pyarrow", "gguf", "vaderSentiment", "wandb"),
)
# What makes matrix products fast, by the names of /proc/cpuinfo.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "sve")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MESHIFT_CACHE",
    "MESHIFT_KERNELS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)
TIMEOUT_S = 10


def collect() -> dict[str, Any]:
    """Everything, as JSON values, by topic. Nothing of it names the user, nor what was trained."""
    return {
        "run": _run_facts(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": {"distribution": _distribution(), "python": platform.python_implementation()},
        "cpu": {"usable": _usable_cores(), "flags": _flags(), "kernels": _kernels()},
        "memory": _memory(),
        "gpus": _gpus(),
        "cache": _cache(),
        "variables": {name: _without_home(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def _run_facts() -> dict[str, Any]:
    """What a run's folder says of its machine too; where torch is broken, that, since it may be the bug."""
    try:
        import torch

        from meshift.runtime.environment import run_environment
    except (ImportError, OSError) as error:
        return {"meshift": __version__, "torch": f"cannot be imported: {error}"}
    return {
        **run_environment(),
        "cuda": torch.version.cuda,
        "cuda_usable": torch.cuda.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _cpu_lines(*keys: str) -> list[str]:
    """The values of the first of these keys in /proc/cpuinfo; none on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [value.strip() for line in lines for key, _, value in [line.partition(":")] if key.strip() in keys]


def _flags() -> list[str]:
    present = set(next(iter(_cpu_lines("flags", "Features")), "").split())
    return [flag for flag in FLAGS if flag in present]


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _kernels() -> str:
    """Whether Meshift's own CPU kernels can be used, else why not."""
    try:
        from meshift.kernels.library import built
    except (ImportError, OSError):  # torch again
        return "not known"
    return _without_home(built().fault) or "built"


def _memory() -> dict[str, float]:
    from meshift.runtime.machine import machine_memory

    memory = machine_memory()
    return {"total_gb": round(memory.total / 1e9, 1), "free_gb": round(memory.free / 1e9, 1)}


def _gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of each GPU that the driver shows, whether or not torch can use it."""
    listed = _output(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    )
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines()]
    return [{"name": row[0], "memory_mib": row[1], "driver": row[2]} for row in rows if len(row) == 3]


def _cache() -> dict[str, Any]:
    try:
        from meshift.cache_folder import cache_root
    except (ImportError, OSError):  # torch again: `_run_facts` says why
        return {}
    root = cache_root()
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    return {"folder": _without_home(str(root)), "gb": round(sum(sizes) / 1e9, 2)}


def _without_home(path: str) -> str:
    """With `~` for the home folder: its name may be the user's."""
    home = str(Path.home())
    return f"~{path.removeprefix(home)}" if path == home or path.startswith(home + os.sep) else path


def _output(command: list[str]) -> str:
    """What a program prints; "" where it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        print()
        return 0
    print_rows("environment", [(what, _in_words(value)) for what, value in found.items()])
    return 0


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(_in_words(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not there" if value is None else str(value)


ENV = Command(
    name="env",
    summary="print what a bug report needs",
    description=(
        "Print what a bug report needs: versions of Meshift and of what it stands on, system, CPU, GPUs,\n"
        "memory, the cache and the variables that change a run. It names no user; nothing is sent anywhere."
    ),
    example="meshift env --json",
    configure=_configure,
    run=_run,
)
