"""Where things are kept that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MIXLAB_CACHE, else mixlab in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MIXLAB_CACHE") or Path(base) / "mixlab")
