"""Where what is made for all runs is kept."""

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """``$HALFBYTE_CACHE``, else ``halfbyte`` in the user's cache directory; of a user without a
    home that can be written to, one of the system's temporary directory."""
    if named := os.environ.get("HALFBYTE_CACHE"):
        return Path(named).expanduser()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "halfbyte"
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as in `docker run -u 1234`
        home = Path("/nonexistent")
    if home.is_dir() and os.access(home, os.W_OK):
        return home / ".cache" / "halfbyte"
    return Path(tempfile.gettempdir()) / f"halfbyte-{os.getuid() if os.name == 'posix' else 0}"
