"""Where things are kept: what can be made again, and what is elsewhere."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MIXLAB_CACHE, else mixlab in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MIXLAB_CACHE") or Path(base) / "mixlab")


def is_url(location: str | os.PathLike) -> bool:
    """Whether this is somewhere else than in the file system, as gs://… and s3://… are."""
    return "://" in str(location)
