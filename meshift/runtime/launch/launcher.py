"""`launch`: runs a config's share in one process to each device, by the launcher that the config names.

It knows which launchers there are, and nothing of how they work or what the processes compute.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from meshift.config.plan import LaunchConfig
from meshift.config.section import Section
from meshift.data.names import parse_name
from meshift.errors import ConfigError, DataError
from meshift.layout.mesh import Mesh
from meshift.runtime.launch.local import run_gang
from meshift.runtime.launch.outpost import Surroundings
from meshift.runtime.launch.watch import Limits
from meshift.runtime.observer import Observer
from meshift.runtime.run_folder import INPUT_KEYS

PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME")
"""Variables that say where files are, besides Meshift's own. No token is passed on."""
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name: where it is 0, Ray listens on loopback only, on any system."""


class Launched(Protocol):
    """What is needed of a run's config."""

    @property
    def output_dir(self) -> str:
        """Where the run writes."""

    @property
    def launch(self) -> LaunchConfig:
        """How its processes are started."""


def launch(config: Launched, mesh: Mesh, entry: str, argument: str, observer: Observer) -> Any:
    """Run `entry` with its argument in a process for each device of the mesh; see `run_gang`.

    Raises `ConfigError` where the launcher is not installed, before anything else.
    """
    settings = config.launch
    limits = Limits(heartbeat_s=settings.heartbeat_timeout_s, hang_s=settings.hang_timeout_s)
    starting = f"starting {len(mesh)} processes; each reads its models"
    if settings.launcher == "local":
        observer.on_message(starting)
        return run_gang(len(mesh), entry, argument, observer, limits)
    if find_spec("ray") is None:
        raise ConfigError('`launch.launcher` is ray, which is not installed; pip install "meshift[ray]" brings it')
    observer.on_message(starting)
    if settings.ray_address is None:
        keep_private()
    from meshift.runtime.launch.ray_gang import run_on_ray

    with _surroundings(config) as surroundings:
        return run_on_ray(settings, mesh, (entry, argument), surroundings, observer, limits)


def keep_private() -> None:
    """Let a cluster that this process starts be open to it alone: on loopback, and with a token.

    Ray reads this when it is imported: where it has been already, it is as open as its own defaults say. What the
    user has set stays.
    """
    if "ray" in sys.modules:
        return
    os.environ.setdefault(LOOPBACK_ONLY, "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def _surroundings(config: Launched) -> Iterator[Surroundings]:
    """What the nodes are told of this machine; while it lasts, a file lies where the run will write."""
    output = Path(config.output_dir).absolute()
    above = next(folder for folder in (output, *output.parents) if folder.is_dir())
    token = above / f".meshift-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        token[0].write_text(token[1], encoding="ascii")
        written = True
    except OSError:  # the run will say so
        written = False
    own = {k: v for k, v in os.environ.items() if k.startswith("MESHIFT_") or k in PASSED_ON}
    try:
        yield Surroundings(
            directory=str(Path.cwd()),
            variables=own,
            modules=tuple(str(Path(place).absolute()) for place in sys.path),
            shared=tuple(dict.fromkeys(local_inputs(config))),
            token=(str(token[0]), token[1]) if written else None,
        )
    finally:
        token[0].unlink(missing_ok=True)


def local_inputs(section: Any) -> Iterator[str]:
    """Files and folders of this machine that a config names as models, data or reward functions."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Section):
                yield from local_inputs(item)
            elif isinstance(item, str) and name in (*INPUT_KEYS, "function"):
                place = Path(_place(name, item)).expanduser()
                if place.exists():
                    yield str(place.absolute())


def _place(key: str, value: str) -> str:
    if key == "function":
        return value.rpartition(":")[0] or value
    if key == "model_name_or_path":
        return value
    try:
        return parse_name(value).source
    except DataError:  # the run will say so
        return value
