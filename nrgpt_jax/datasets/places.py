"""Where data lives, and the names of prepared data.

Corpora are looked for under `NRGPT_DATA_DIR`, then under `data/` of the repository. What is made
from them (tokens, ListOps expressions) is written once below `NRGPT_CACHE_DIR`, by default
`data/prepared/`, under a name that changes with every setting it depends on. Where the package is
installed without its repository, `data/` is `nrgpt_jax` in the cache folder of the user. No library
decides where a user's corpora lie, nor on which settings ours depend.
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
    """Folders in which a corpus may lie; a download goes to the first."""
    named = os.environ.get("NRGPT_DATA_DIR")
    return ([Path(named)] if named else []) + [DATA_HOME]


def cache_root() -> Path:
    """The folder of prepared data sets."""
    return Path(os.environ.get("NRGPT_CACHE_DIR") or DATA_HOME / "prepared")


def unwritable(error: Exception, place: Path) -> UserError:
    """What to say when prepared data cannot be written: a full disk, a folder of another user."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
    named = getattr(error, "filename", None) or place
    return UserError(
        f"{named} cannot be written ({reason}); make room there, or name another folder for "
        "prepared data: NRGPT_CACHE_DIR=..."
    )


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for a set of settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
