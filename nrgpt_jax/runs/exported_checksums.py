"""checksums.json of an exported folder: what the other files are, so that damage is seen."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from absl import logging

from nrgpt_jax import disk
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.checksums import FILE_NAME

CURE = "export the run again"


class Checksums(msgspec.Struct, forbid_unknown_fields=True):
    """The checksum of each file by its name."""

    files: dict[str, str]


def write(folder: Path, names: Iterable[str]) -> None:
    """Records the files of these names as they are now.

    Raises:
      OSError: one cannot be read, or the record cannot be written.
    """
    found = {name: disk.file_checksum(folder / name) for name in sorted(names)}
    disk.write_json(folder / FILE_NAME, {"files": found})


def read(folder: Path) -> dict[str, str]:
    """The recorded checksums by the names of the files; none in folders of older versions.

    Raises:
      UserError: the record is damaged.
    """
    path = folder / FILE_NAME
    try:
        recorded = disk.read_json(path, Checksums, CURE)[0].files
    except FileNotFoundError:
        return {}
    for name in recorded:
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{path} names {name!r}, which is no file of its folder; {CURE}")
    return recorded


def verify(folder: Path, recorded: Mapping[str, str]) -> None:
    """Raises UserError naming a file that is missing or is not as it was written."""
    for name, checksum in recorded.items():
        _verify(folder / name, checksum)


def _verify(path: Path, checksum: str) -> None:
    try:
        found = disk.file_checksum(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {CURE}") from None
    if found != checksum:
        raise UserError(
            f"{path} does not match its checksum: it was damaged or edited; {CURE} (if you edited "
            f"it, remove {path.parent / FILE_NAME})"
        )


def warn_unverified(folder: Path) -> None:
    """Says that a folder cannot be verified."""
    logging.warning("%s has no %s, so damage would not be seen; %s", folder, FILE_NAME, CURE)
