"""The layers of the sandbox by name, what each is for, and what to do where a machine does not have one.

It knows nothing of how they are built.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

WALL, NAMESPACES, PRIVILEGES, LIMITS, LANDLOCK, SECCOMP = (
    "wall", "namespaces", "privileges", "limits", "landlock", "seccomp",
)  # fmt: skip
LAYERS = (WALL, NAMESPACES, PRIVILEGES, LIMITS, LANDLOCK, SECCOMP)
"""Outermost first. A cgroup is not among them: without one, limits still hold every test's only process."""

USER_NAMESPACES = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined)"
)
FIXES = {
    WALL: f"install bubblewrap (Debian: apt-get install bubblewrap), or {USER_NAMESPACES}",
    NAMESPACES: USER_NAMESPACES,
    PRIVILEGES: f"run as a user of its own or as root, and {USER_NAMESPACES}",
    LIMITS: "start the run where rlimits may be lowered (no ptrace or container policy against prlimit)",
    LANDLOCK: "use Linux 5.13 or newer with landlock among its LSMs (kernel parameter lsm=landlock,...)",
    SECCOMP: "use a kernel with CONFIG_SECCOMP_FILTER",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. `memory_bytes` is on top of what the interpreter has before it begins."""

    cpu_s: float = 4.0
    wall_s: float = 10.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    num_threads: int = 16

    def to_json(self) -> dict[str, float]:
        """Plain values, for the server."""
        return asdict(self)
