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
import stat
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
NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})
"""What /proc/cpuinfo must name."""
COMPILERS = ("gcc", "cc")
PAIRS_FLAG = "avx512_bf16"
"""What products of bfloat16 pairs are one instruction with, and several without."""
OPTIONS = (
    *("-std=gnu11", "-O3", "-fno-strict-aliasing", "-fPIC", "-fopenmp", "-Wall"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
)
TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Built:
    """A library that was loaded, with a digest of its code, or one sentence why there is none."""

    library: ctypes.CDLL | None = None
    digest: str = ""
    fault: str = ""


def build() -> Built:
    """The kernels, compiled now (some seconds) unless the cache has them."""
    fault = unsupported()
    if fault:
        return Built(fault=fault)
    try:
        return _obtain(_cached())
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


def options() -> tuple[str, ...]:
    """The compiler's, for the processor that is here."""
    return (*OPTIONS, "-mavx512bf16") if PAIRS_FLAG in cpu_flags() else OPTIONS


def _cached() -> Path:
    """Where the library is kept. Its name is a digest of sources and options, so that neither changes unseen."""
    digest = hashlib.sha256(" ".join(options()).encode())
    for file in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_root() / "kernels" / f"{digest.hexdigest()[:16]}.so"


def _obtain(path: Path) -> Built:
    """The kept library, or one that is made now: also where the kept one is damaged, or somebody else's."""
    if path.is_file() and _is_ours(path.parent) and _is_ours(path):
        try:
            return _load(path)
        except OSError:
            pass  # damaged
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompileError(f"there is no C compiler ({' or '.join(COMPILERS)}); install gcc")
    folder = _own_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        made = _compile(compiler, sorted(SOURCES.glob("*.c")), Path(scratch))
        loaded = _load(made)  # before it gets its name: what cannot be loaded is not kept
        if folder is not None:
            made.chmod(0o700)
            made.replace(path)
    return loaded


def _own_folder(folder: Path) -> Path | None:
    """The folder, made where it is missing; None where others could write what is kept there, or we could not."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = _is_ours(folder) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return None
    return folder if usable else None


def _is_ours(path: Path) -> bool:
    """Whether this user owns it and nobody else may write to it; code of others is not loaded."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022


def _compile(compiler: str, files: Sequence[Path], scratch: Path) -> Path:
    """Objects, then a library that takes OpenMP from the process: torch's, so that both have the same threads."""
    objects = [scratch / f"{file.stem}.o" for file in files]
    target = scratch / "kernels.so"
    running = [
        subprocess.Popen(
            [compiler, *options(), "-c", str(file), "-o", str(made)], stderr=subprocess.PIPE, text=True
        )
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


def _load(path: Path) -> Built:
    openmp = openmp_of_torch()
    if openmp is None:
        raise CompileError("torch brings no OpenMP here")
    ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    return Built(library=library, digest=hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def openmp_of_torch() -> Path | None:
    """The OpenMP library that torch has brought into this process."""
    import torch  # noqa: F401  (it must be loaded before one can see with what)

    mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(name for name in mapped if Path(name).name.startswith(("libgomp", "libiomp5", "libomp")))
    inside = [name for name in found if "torch" in name]
    return Path((inside or found)[0]) if found else None
