"""Where files live that can be made or fetched again."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """The user's cache folder of this package; it need not exist.

    SPARSESPEC_CACHE, else XDG_CACHE_HOME/sparsespec_jax, else
    ~/.cache/sparsespec_jax.
    """
    if own := os.environ.get("SPARSESPEC_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    base = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return base / "sparsespec_jax"
