"""Where what can be made again is kept between commands."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """QLORA_PIPE_CACHE, or else `qlora-pipe` in the folder that this system keeps caches in."""
    named = os.environ.get("QLORA_PIPE_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qlora-pipe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qlora-pipe"
