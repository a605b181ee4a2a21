"""`path/to/file.py:name`, `package.module:name` or a server's URL to the function.

It knows nothing of what the function is given or returns. It imports neither torch nor the config.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from meshift.errors import ConfigError
from meshift.rewards.signatures import RewardFunction

IN_CONFIG = "reward.functions names"


def load_function(spec: str) -> RewardFunction:
    """Import the function. Raises `ConfigError` with one sentence where it is not there, or is no function."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"cannot read the reward function {spec!r}; write it as file.py:name or module:name")
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    if not hasattr(module, name):
        own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{place} has no function {name!r}{_hint(name, own)} ({IN_CONFIG} {spec!r})")
    function: RewardFunction = getattr(module, name)
    if not callable(function) or isinstance(function, type):
        what = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise ConfigError(f"{name!r} in {place} is {what}; name a function there ({IN_CONFIG} {spec!r})")
    return function


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no file {path}{_hint(path.name, others)} ({IN_CONFIG} {spec!r})")
    module_spec = importlib.util.spec_from_file_location(f"meshift_reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path} is not a Python file ({IN_CONFIG} {spec!r})")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    # As for a script: modules beside the file are found, also by imports inside its functions. Last, so that
    # none of them takes the name of an installed one.
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return _executed(lambda: module_spec.loader.exec_module(module) or module, path, spec)  # type: ignore[union-attr]


def _load_module(name: str, spec: str) -> ModuleType:
    try:
        return _executed(lambda: importlib.import_module(name), name, spec)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name in (name, name.partition(".")[0]):
            raise ConfigError(f"{error}; PYTHONPATH=. lets Python find modules in the current folder") from error
        raise


def _executed(load: Callable[[], ModuleType], place: object, spec: str) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:  # a script may call sys.exit where it is imported
        raise ConfigError(
            f"importing {place} failed with {type(error).__name__}: {error} ({IN_CONFIG} {spec!r})"
        ) from error
