"""Fetches a corpus once, checks its checksum, and says what to do by hand when it cannot.

urllib fetches; nothing that is installed anyway keeps one file by its checksum under a chosen name.
"""

import hashlib
import http.client
import urllib.request
from pathlib import Path

from nrgpt_jax import disk
from nrgpt_jax.datasets.places import data_roots
from nrgpt_jax.errors import UserError

TIMEOUT_SECONDS = 60


def fetch(relative_path: str, url: str, sha256: str) -> Path:
    """The local path of a corpus, downloaded to the data root if it is in none of them.

    Raises:
      UserError: a file has another checksum, or it is missing and cannot be downloaded; the
        message names the URL, the checksum and where to put the file.
    """
    for root in data_roots():
        path = root / relative_path
        if path.is_file():
            _check(path.read_bytes(), sha256, str(path), f"remove it, or replace it from {url}")
            return path
    target = data_roots()[0] / relative_path
    by_hand = f"fetch it by hand (sha256 {sha256}) and put it at {target}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}); {by_hand}") from None
    _check(content, sha256, f"what {url} returned", by_hand)
    target.parent.mkdir(parents=True, exist_ok=True)
    disk.write_whole(target, content)
    return target


def _check(content: bytes, sha256: str, what: str, cure: str) -> None:
    result = hashlib.sha256(content).hexdigest()
    if result != sha256:
        raise UserError(f"{what} has sha256 {result}, expected {sha256}; {cure}")
