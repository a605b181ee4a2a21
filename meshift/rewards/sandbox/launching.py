"""How a fork server is started: behind bubblewrap where it is installed, else behind a wall that it builds itself.

It knows nothing of what the server is asked.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meshift.rewards.sandbox.jail import WORK_FOLDER

WallKind = Literal["bubblewrap", "own", "none"]
PACKAGE_INSIDE = "/opt/meshift-sandbox"
FOLDERS_INSIDE = "/opt/meshift-packages"
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/zero", "/dev/random", "/dev/urandom")
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from meshift.rewards.sandbox.server import main; "
    "del sys.path[0]; main(sys.argv[1])"
)


def package() -> Path:
    """Where Meshift's own modules are."""
    return Path(__file__).resolve().parents[2]


def best_wall() -> WallKind:
    """Bubblewrap, if it is installed."""
    return "bubblewrap" if shutil.which("bwrap") else "own"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the server is started with. `folders` are further ones that programs may read (and import from)."""

    wall: WallKind
    folders: tuple[str, ...] = ()

    def command(self, control: int) -> list[str]:
        """The command line of a server that serves on the socket `control`, which it inherits."""
        found = PACKAGE_INSIDE if self.wall == "bubblewrap" else str(package().parent)  # at the start
        settings = {
            "control": control,
            "build_wall": self.wall == "own",
            "binds": self._binds(),
            "drop_root": self.wall != "none" or all(map(_is_open_to_all, python_folders())),
            "packages": [inside for _, inside in self._packages()],
            "readable": [*self._readable(), *DEVICES],
        }
        flags = ["-I", "-S", "-X", "utf8", "-c", START]
        server = [self.interpreter, *flags, found, json.dumps(settings)]
        return [*self._bubblewrap(), *server] if self.wall == "bubblewrap" else server

    @property
    def interpreter(self) -> str:
        """Python itself, not a virtual environment's link to it."""
        return _interpreter()

    def _packages(self) -> list[tuple[str, str]]:
        """Where each of `folders` is, and where programs see it: elsewhere, where their own /tmp would hide it."""
        movable = self.wall != "none"
        return [
            (folder, f"{FOLDERS_INSIDE}/{i}" if movable and _is_below(folder, WORK_FOLDER) else folder)
            for i, folder in enumerate(self.folders)
        ]

    def _binds(self) -> list[tuple[str, str]]:
        same = [*python_folders(), *SYSTEM, *(folder for folder, inside in self._packages() if inside == folder)]
        there = list(dict.fromkeys(p for p in same if os.path.exists(p)))
        tops = [p for p in there if not any(p != other and _is_below(p, other) for other in there)]
        moved = [(folder, inside) for folder, inside in self._packages() if inside != folder]
        return [*((p, p) for p in tops), *moved, (str(package()), f"{PACKAGE_INSIDE}/{package().name}")]

    def _readable(self) -> list[str]:
        """What a program may read: the targets of the binds, each once where several are links to one."""
        own = str(package()) if self.wall == "none" else f"{PACKAGE_INSIDE}/{package().name}"
        places = {os.path.realpath(target): target for _, target in self._binds()[:-1]}
        return [*places.values(), own]

    def _bubblewrap(self) -> list[str]:
        found = shutil.which("bwrap")
        options = [found or "bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        options += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
        if os.geteuid() == 0:  # to become another user within
            options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            options += ["--unshare-user"]
        options += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        for folder in _parents([target for _, target in self._binds()]):
            options += ["--perms", "0755", "--dir", folder]  # else none but root would get through them
        for source, target in self._binds():
            options += ["--ro-bind", source, target]
        return [*options, "--chdir", "/", "--remount-ro", "/", "--"]


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def python_folders() -> Sequence[str]:
    """Where the interpreter, its library and its extension modules are: those of Python itself, since a virtual
    environment has nothing of it but packages, which programs are not to read."""
    prefix = sys.base_exec_prefix
    library = sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars={"platbase": prefix})
    paths = [os.path.dirname(_interpreter()), *library]
    return paths if prefix in ("/", "/usr", "/usr/local") else [prefix, *paths]


def _is_open_to_all(folder: str) -> bool:
    return all(path.stat().st_mode & 0o001 for path in (Path(folder), *Path(folder).parents))


def _parents(paths: Sequence[str]) -> list[str]:
    """All folders above these, outermost first."""
    above = {str(parent) for path in paths for parent in Path(path).parents}
    return sorted(above - {"/"}, key=len)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
