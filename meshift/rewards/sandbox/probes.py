"""Attacks that are tried before the first program, on each layer while the others inside it are down: a layer
counts as there when all attacks on it fail.

The attacks are ours and report honestly what they could do. Where one succeeds, the layer is missing.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from meshift.errors import ConfigError
from meshift.rewards.sandbox.jail import WORK_FOLDER
from meshift.rewards.sandbox.launching import Launch, WallKind, best_wall, python_folders
from meshift.rewards.sandbox.layers import (
    FIXES,
    LANDLOCK,
    LAYERS,
    LIMITS,
    NAMESPACES,
    PRIVILEGES,
    SECCOMP,
    WALL,
    Limits,
)
from meshift.rewards.sandbox.slot import MemoryFile, Process, SandboxError, Slot
from meshift.rewards.sandbox.syscalls import ARCHITECTURES

HEAD = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
given = json.loads(sys.stdin.read())
done = []
def attack(name, function):
    try:
        if function() is not False:
            done.append(name)
    except (OSError, MemoryError, RuntimeError, ValueError, ImportError):
        pass
def call(number, *arguments):
    return libc.syscall(number, *arguments) >= 0
"""
TAIL = "\nprint(json.dumps(done))\n"

WALL_ATTACKS = """
import socket
attack("read a file of the machine", lambda: open(given["canary"]).read())
attack("read the password hashes", lambda: open("/etc/shadow").read())
attack("see the run's process", lambda: os.path.basename(os.readlink(f"/proc/{given['pid']}/exe")) == given["exe"])
attack("signal the run's process", lambda: given["pid"] > 50 and os.kill(given["pid"], 0))
attack("write to Python's library", lambda: open(os.path.join(os.path.dirname(os.__file__), "probe.py"), "w"))
attack("write to the root folder", lambda: open("/probe", "w"))
attack("connect to a port of this machine", lambda: socket.create_connection(("127.0.0.1", given["port"]), 1))
attack("be root", lambda: os.getuid() == 0 or os.setuid(0))
"""
LEAVE = """
open("/tmp/left", "w").write("x")
libc.shmget(0x4D534846, 4096, 0o1666)
"""
NAMESPACE_ATTACKS = """
attack("see another process", lambda: os.getpid() != 1 or os.getppid() != 0)
attack("signal another process", lambda: any(libc.kill(pid, 0) == 0 for pid in range(2, 64)))
attack("find what another program left in a file", lambda: os.path.exists("/tmp/left"))
attack("find what another program left in shared memory", lambda: libc.shmget(0x4D534846, 4096, 0) >= 0)
attack("read the memory of another process", lambda: open("/proc/1/mem", "rb"))
"""
PRIVILEGE_ATTACKS = """
sets = ctypes.create_string_buffer(24)
attack("become root", lambda: os.getuid() == 0 or os.setuid(0))
attack("mount", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0)
attack("name the machine", lambda: libc.sethostname(b"x", 1) == 0)
attack("change the root folder", lambda: os.chroot("/tmp"))
attack("hold a capability", lambda: libc.capget(bytes([0x22, 5, 8, 0x20]) + bytes(4), sets) == 0 and any(sets.raw))
"""
LIMIT_ATTACKS = """
attack("take more memory", lambda: bytearray(given["memory"]))
attack("write more", lambda: os.write(1, b" " * given["output"]) == given["output"])
os.ftruncate(1, 0)
os.lseek(1, 0, 0)
attack("open 1000 files", lambda: [os.dup(0) for _ in range(1000)])
"""
LANDLOCK_ATTACKS = """
attack("list the root folder", lambda: os.listdir("/"))
attack("read /proc", lambda: open("/proc/self/status").read())
attack("read the server's memory", lambda: open(f"/proc/{os.getppid()}/mem", "rb"))
attack("make a link", lambda: os.symlink("/", "/tmp/link"))
"""
# x86_64 and aarch64 share the numbers from 424 on; the others are asked for through libc.
SECCOMP_ATTACKS = """
import socket
attack("make a process", lambda: os.fork() or os._exit(0))
said = "print('[\\"run a program\\"]')"
attack("run a program", lambda: os.execv(given["python"], [given["python"], "-c", said]))
attack("open a socket", lambda: socket.socket())
attack("trace", lambda: libc.ptrace(0, 0, 0, 0) == 0)
attack("make a memory file", lambda: os.memfd_create("x"))
attack("leave its namespaces", lambda: libc.unshare(0x10000000) == 0)
attack("use io_uring", lambda: call(425, 1, ctypes.create_string_buffer(120)))
attack("open a process", lambda: os.pidfd_open(os.getpid()))
attack("get at keys", lambda: libc.syscall(250 if os.uname().machine == "x86_64" else 219, 0, -3, 1) >= 0)
"""
ATTACKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    NAMESPACES: (NAMESPACE_ATTACKS, (NAMESPACES,)),
    PRIVILEGES: (PRIVILEGE_ATTACKS, (NAMESPACES, PRIVILEGES)),
    LIMITS: (LIMIT_ATTACKS, (LIMITS,)),
    LANDLOCK: (LANDLOCK_ATTACKS, (LANDLOCK,)),
    SECCOMP: (SECCOMP_ATTACKS, (SECCOMP,)),
}
"""By layer: what is tried, and the layers that are up meanwhile."""
PROBE_LIMITS = Limits(cpu_s=5.0, wall_s=20.0, memory_bytes=64 * 2**20, output_bytes=2**16)
PROBE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What a machine can do: the wall, the layers that are there, and by name what is wrong with the others, and
    what to do where that is not what `FIXES` says."""

    wall: WallKind
    layers: tuple[str, ...]
    missing: Mapping[str, str]
    fixes: Mapping[str, str] = field(default_factory=dict)

    def require_all(self) -> None:
        """Raise `ConfigError` naming the first layer that is missing and what to do."""
        for layer in LAYERS:
            if layer in self.missing:
                fix = self.fixes.get(layer, FIXES[layer])
                raise ConfigError(
                    f"the sandbox has no {layer} layer here ({self.missing[layer]}); {fix}, or set "
                    "sandbox: unsafe in its kwargs to run generated code without it"
                )

    def describe(self) -> str:
        """For a dry run: "bubblewrap, namespaces, ..."."""
        inner = ", ".join(layer for layer in self.layers if layer != WALL)
        wall = {"bubblewrap": "bubblewrap", "own": "a wall of its own", "none": "no wall"}[self.wall]
        return f"{wall}, {inner}" + "".join(f"; no {layer}" for layer in self.missing if layer not in self.layers)


def probe(walls: Collection[WallKind] | None = None) -> Protection:
    """Try every attack. Raises `ConfigError` where no program can be run at all. Of the walls (default:
    bubblewrap if installed, then our own) the first that holds is taken."""
    _check_machine()
    missing: dict[str, str] = {}
    order = walls if walls is not None else dict.fromkeys((best_wall(), "own"))
    for wall in order:
        with _slot(wall) as slot:
            wrong = _wrong_with_wall(slot)
            if wrong is None:
                return _protection(slot, {})
            missing.setdefault(WALL, f"{wall}: {wrong}")
    missing.setdefault(WALL, "none was asked for")
    with _slot("none") as slot:
        return _protection(slot, missing)


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        here = f"{sys.platform} on {platform.machine()}"
        raise ConfigError(f"generated code is run on Linux on {' or '.join(ARCHITECTURES)} alone, not on {here}")


def _hidden_python() -> str | None:
    """Where Python is, if a program's own /tmp would hide it."""
    return next((path for path in python_folders() if path.startswith(f"{WORK_FOLDER}/")), None)


@contextmanager
def _slot(wall: WallKind) -> Iterator[Slot]:
    slot = Slot(Launch(wall=wall), PROBE_BYTES)
    try:
        yield slot
    finally:
        slot.close()


def _protection(slot: Slot, missing: Mapping[str, str]) -> Protection:
    found, hidden = dict(missing), _hidden_python()
    fixes: dict[str, str] = {}
    if hidden is not None:
        found[NAMESPACES] = f"Python is installed in {hidden}, which the /tmp of each program's own would hide"
        fixes[NAMESPACES] = "run Meshift by a Python that is installed elsewhere"
    for layer, (attacks, up) in ATTACKS.items():
        if layer in found:
            continue
        wrong = next((f"needs {need}" for need in up if need != layer and need in found), None)
        wrong = wrong or _wrong(slot, attacks, up)
        if wrong is not None:
            found[layer] = wrong
    layers = tuple(layer for layer in LAYERS if layer not in found)
    if PRIVILEGES in found and NAMESPACES in found and LANDLOCK in layers:
        layers = (*layers, PRIVILEGES)  # it drops what there is; without namespaces no attack can tell
    return Protection(wall=slot.launch.wall, layers=layers, missing=found, fixes=fixes)


def _wrong(slot: Slot, attacks: str, up: Collection[str]) -> str | None:
    try:
        if NAMESPACES in up:
            _run(slot, LEAVE, {}, up)
        given = {
            "memory": PROBE_LIMITS.memory_bytes * 2,
            "output": PROBE_LIMITS.output_bytes * 4,
            "python": slot.launch.interpreter,
        }
        done = _run(slot, attacks, given, up)
    except SandboxError as error:
        return str(error)
    return f"a program could {done[0]}" if done else None


def _wrong_with_wall(slot: Slot) -> str | None:
    with tempfile.NamedTemporaryFile() as canary, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(canary.name, 0o644)
        given = {
            "canary": canary.name,
            "pid": os.getpid(),
            "exe": os.path.basename(os.path.realpath("/proc/self/exe")),
            "port": listener.getsockname()[1],
        }
        try:
            slot.start()
            done = _run(slot, WALL_ATTACKS, given, ())
        except SandboxError as error:
            return str(error)
    return f"a program could {done[0]}" if done else None


def _run(slot: Slot, attacks: str, given: Mapping[str, object], up: Collection[str]) -> list[str]:
    """The names of the attacks that succeeded."""
    code = HEAD + attacks + TAIL
    with (
        MemoryFile(code.encode()) as program,
        MemoryFile(json.dumps(given).encode()) as text,
        MemoryFile() as output,
        MemoryFile() as errors,
    ):
        files = {"code": program.place, "stdin": text.place, "stdout": output.place, "stderr": errors.place}
        [ended] = slot.run([Process(kind="program", files=files, limits=PROBE_LIMITS, layers=up)])
        said = output.read(PROBE_LIMITS.output_bytes).decode().strip()
        why = errors.read(2000).decode(errors="replace").strip().splitlines()
    if ended.status != 0 or not said:
        raise SandboxError(f"the probe ended with status {ended.status}: {why[-1] if why else said[:200]}")
    return [str(name) for name in json.loads(said)]
