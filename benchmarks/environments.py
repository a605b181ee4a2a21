"""One virtual environment per peer, made with `venv` and pip from a pinned requirement file and kept in a cache.

It knows nothing of what the peers do; a peer that cannot be installed is a sentence, not an error.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshift.cache_folder import cache_root

REQUIREMENTS = Path(__file__).parent / "peers"
INSTALLED = "installed.txt"
"""Written into an environment when pip is done: the requirements it was made from."""
WITHOUT = "# without:"
INSTALL_TIMEOUT_S = 3600.0

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An interpreter for a peer, or one sentence why there is none."""

    name: str
    python: Path | None = None
    fault: str = ""


def default_root() -> Path:
    """Where environments are kept: `~/.cache/meshift/benchmarks`, or below `$MESHIFT_CACHE`."""
    return cache_root() / "benchmarks"


def obtain_environment(name: str, root: Path, *, run: Run | None = None) -> Environment:
    """The environment of `peers/<name>.txt`: the kept one, else made now, which takes minutes.

    Its folder is named after a digest of the requirements and of this Python's version, so that neither can
    change unseen. A half-made environment is made anew.
    """
    run = run or _run_politely
    requirements = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    folder = environment_folder(name, requirements, root)
    python = folder / "bin" / "python"
    if (folder / INSTALLED).is_file() and python.exists():
        return Environment(name=name, python=python)
    try:
        _make(folder, python, REQUIREMENTS / f"{name}.txt", run)
        (folder / INSTALLED).write_text(requirements, encoding="utf-8")
    except (OSError, subprocess.SubprocessError, InstallError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        return Environment(name=name, fault=f"{name} could not be installed ({error})")
    return Environment(name=name, python=python)


class InstallError(Exception):
    """`venv` or pip ended with an error; the message is the line that says why."""


def environment_folder(name: str, requirements: str, root: Path) -> Path:
    """The folder of an environment: its name, and a digest of what it is made from."""
    recipe = f"{sys.version_info[:3]}\n{requirements}"
    return root / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _make(folder: Path, python: Path, requirements: Path, run: Run) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, "install", "-r", str(requirements)]]
    if unwanted := without(requirements.read_text(encoding="utf-8")):
        commands.append([*pip, "uninstall", "--yes", *unwanted])
    for command in commands:
        done = run(command)
        if done.returncode != 0:
            raise InstallError(reason_of(done.stderr))


def without(requirements: str) -> list[str]:
    """Packages to take out again, which another requires and nobody needs: the line `# without: a b`."""
    lines = requirements.splitlines()
    return [name for line in lines if line.startswith(WITHOUT) for name in line.removeprefix(WITHOUT).split()]


def reason_of(errors: str) -> str:
    """The line of pip's output that says why it failed."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    wanted = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason given")
    return wanted.removeprefix("ERROR:").strip()


def _run_politely(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run at the lowest priority: an installation is no hurry."""
    nice = shutil.which("nice")
    prefix = [nice, "-n", "19"] if nice else []
    return subprocess.run(
        [*prefix, *command], capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S
    )
