"""Download of a corpus, verified by its checksum; on failure, instructions to do it by hand.

urllib downloads, since no dependency stores one file by its checksum under a chosen name.
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
    """Return the local path of a corpus; download it to the first data root if no root has it.

    Raises:
      UserError: the checksum differs, or the file is missing and cannot be downloaded; the
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
