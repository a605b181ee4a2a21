"""Compiles the C files of this folder once per machine and keeps the library in the cache.

No package is needed for it but the C compiler that most systems have; where there is none, or where the processor
lacks what the kernels use, there is a reason instead of a library, and torch's own kernels do the work. Knows
nothing of what the kernels compute.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from meshift.cache_folder import cache_root

SOURCES = Path(__file__).parent
SWITCH = "MESHIFT_KERNELS"
"""Set to 0, this variable leaves everything to torch."""
NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"})
"""What /proc/cpuinfo must name."""
COMPILERS = ("gcc", "cc")
OPTIONS = (
    *("-std=gnu11", "-O3", "-fno-strict-aliasing", "-fPIC", "-fopenmp", "-Wall"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)
TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Built:
    """A library that was loaded, or one sentence why there is none."""

    library: ctypes.CDLL | None = None
    fault: str = ""


def build() -> Built:
    """The kernels, compiled now (some seconds) unless the cache has them."""
    fault = unsupported()
    if fault:
        return Built(fault=fault)
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    try:
        return Built(library=_load(_library(compiler)))
    except (OSError, subprocess.SubprocessError, CompileError) as error:
        return Built(fault=f"the CPU kernels could not be built: {' '.join(str(error).split())[:300]}")


class CompileError(Exception):
    """There is no compiler, or it refused the sources."""


def unsupported() -> str:
    """Why this machine cannot have the kernels; "" where it can."""
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "off", "false", "no"):
        return f"the CPU kernels are switched off by {SWITCH}"
    if platform.system() != "Linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return "the CPU kernels are for Linux on x86-64"
    missing = sorted(NEEDED_FLAGS - cpu_flags())
    return f"the CPU kernels need a processor with {', '.join(missing)}" if missing else ""


@cache
def cpu_flags() -> frozenset[str]:
    """What the first processor of /proc/cpuinfo can do; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def _library(compiler: str | None) -> Path:
    """The compiled library. Its name is a digest of sources and options, so that neither changes unseen."""
    files = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = cache_root() / "kernels"
    path = folder / f"{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        if compiler is None:
            raise CompileError(f"there is no C compiler ({' or '.join(COMPILERS)}); install gcc")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            made = _compile(compiler, [file for file in files if file.suffix == ".c"], Path(scratch))
            made.replace(path)
    return path


def _compile(compiler: str, files: Sequence[Path], scratch: Path) -> Path:
    """Objects, then a library that takes OpenMP from the process: torch's, so that both have the same threads."""
    objects = [scratch / f"{file.stem}.o" for file in files]
    target = scratch / "kernels.so"
    running = [
        subprocess.Popen([compiler, *OPTIONS, "-c", str(file), "-o", str(made)], stderr=subprocess.PIPE, text=True)
        for file, made in zip(files, objects, strict=True)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in running]
    except subprocess.TimeoutExpired:
        for process in running:
            process.kill()
            process.communicate()
        raise CompileError(f"{compiler} took more than {TIMEOUT_S} s") from None
    for process, error in zip(running, errors, strict=True):
        if process.returncode != 0:
            raise CompileError(error.strip() or f"{compiler} ended with {process.returncode}")
    link = [compiler, "-shared", "-o", str(target), *map(str, objects), "-lm"]
    done = subprocess.run(link, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise CompileError(done.stderr.strip() or f"{compiler} could not link")
    return target


def _load(path: Path) -> ctypes.CDLL:
    openmp = openmp_of_torch()
    if openmp is None:
        raise CompileError("torch brings no OpenMP here")
    ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        path.unlink(missing_ok=True)  # damaged, perhaps: the next process builds it anew
        raise


def openmp_of_torch() -> Path | None:
    """The OpenMP library that torch has brought into this process."""
    import torch  # noqa: F401  (it must be loaded before one can see with what)

    mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(name for name in mapped if Path(name).name.startswith(("libgomp", "libiomp5", "libomp")))
    inside = [name for name in found if "torch" in name]
    return Path((inside or found)[0]) if found else None
