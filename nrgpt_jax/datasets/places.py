"""Locations of corpora, and locations and names of prepared data.

Corpora are searched for in `NRGPT_DATA_DIR`, then in `data/` of the repository. Prepared data
(tokens, ListOps expressions) are written once below `NRGPT_CACHE_DIR`, by default `data/prepared/`,
under a name that changes with every setting they depend on. If the package is installed without its
repository, `data/` is `nrgpt_jax` in the user's cache folder. No library knows a user's locations
or these settings.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nrgpt_jax.errors import UserError


def _data_home(repository: Path) -> Path:
    if (repository / "setup.cfg").is_file():
        return repository / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nrgpt_jax"


DATA_HOME = _data_home(Path(__file__).resolve().parents[2])


def data_roots() -> list[Path]:
    """Return the folders to search for corpora; downloads go to the first."""
    named = os.environ.get("NRGPT_DATA_DIR")
    return ([Path(named)] if named else []) + [DATA_HOME]


def cache_root() -> Path:
    """Return the folder of prepared data sets."""
    return Path(os.environ.get("NRGPT_CACHE_DIR") or DATA_HOME / "prepared")


def unwritable(error: Exception, place: Path) -> UserError:
    """Return the error for prepared data that cannot be written: full disk, no permission."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
    named = getattr(error, "filename", None) or place
    return UserError(
        f"{named} cannot be written ({reason}); make room there, or name another folder for "
        "prepared data: NRGPT_CACHE_DIR=..."
    )


def digest(settings: Mapping[str, Any]) -> str:
    """Return a hash of settings, 12 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
