"""Where measurements and verdicts about this machine are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``DMOE_CACHE_DIR``, or ``dmoe`` in the user's cache folder; None for a user without a home."""
    own = os.environ.get("DMOE_CACHE_DIR")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(shared or Path.home() / ".cache") / "dmoe"
    except RuntimeError:
        return None
