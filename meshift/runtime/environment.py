"""What a run ran on, as one flat object: versions, system, processor, threads, device, commit.

It names no user and no path, so that a report can be passed on. `meshift env` says more, for bug reports.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from meshift import __version__
from meshift.kernels.cpu import who_multiplies
from meshift.runtime.durable import write_bytes

ENVIRONMENT = "environment.json"
PACKAGES = ("transformers", "safetensors", "numpy")
TIMEOUT_S = 10

Fact = str | int | None


def run_environment() -> dict[str, Fact]:
    """The facts, in the order in which a reader wants them; None for what cannot be told."""
    return {
        "meshift": __version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": _device(),
        "cpu_kernels": who_multiplies(),
    }


def write_environment(folder: Path) -> None:
    """`environment.json` in a run's folder, whole or not at all."""
    text = json.dumps(run_environment(), indent=2, ensure_ascii=False)
    write_bytes(folder / ENVIRONMENT, f"{text}\n".encode())


def source_commit() -> str | None:
    """The commit of the source tree that Meshift runs from, `-dirty` where files differ; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The model's name from Linux, else what the platform says."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "CPU"
