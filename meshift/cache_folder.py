"""Where Meshift keeps what it obtains or makes once for all runs of a user. Knows nothing of what lies there."""

import os
from pathlib import Path


def cache_root() -> Path:
    """`$MESHIFT_CACHE`, else `~/.cache/meshift`."""
    named = os.environ.get("MESHIFT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "meshift"
