"""Atomic writes of small files, and JSON files verified by checksum and schema.

A JSON file contains its own checksum (XXH3, 128 bits). It is of the canonical form: white space and
the order of fields do not matter. The schema of the content is a type checked by msgspec.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import xxhash

from nrgpt_jax import paths
from nrgpt_jax.errors import UserError

CHECKSUM = "checksum"
MOST_BYTES = 64 * 2**20  # largest JSON file; a vocabulary of a million symbols takes a third
_CHUNK = 2**20

Schema = TypeVar("Schema")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically; a file that already has this content is not rewritten.

    Raises:
      OSError: the file cannot be written; its previous content is unchanged.
    """
    if paths.on_bucket(path):
        with paths.os_errors(path):
            path.write_bytes(content)
        return
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that atomically replaces `path` at the end; removed on failure.

    Raises:
      OSError: from the block or the replacement; it names `path`.
    """
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # may name no file, or partial
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Sync a folder to disk, so that the names of its files survive a power failure."""
    with contextlib.suppress(OSError):  # some file systems do not support it
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file with its checksum. Raises the same errors as `write_whole`."""
    complete = {**record, CHECKSUM: checksum_of(record)}
    write_whole(path, (json.dumps(complete, indent=1) + "\n").encode())


def read_json(
    path: Path,
    schema: type[Schema],
    cure: str,
    change: Callable[[Any], Any] = lambda content: content,
) -> Schema:
    """Read a JSON file and check its schema and checksum; files of older versions have no checksum.

    Args:
      path: path of the file.
      schema: `msgspec` type of the content, without the checksum.
      cure: advice for an unreadable file, appended to the error message.
      change: function applied to the content before the schema check.

    Raises:
      FileNotFoundError: the file does not exist.
      UserError: the file is unreadable, or does not match the schema or its checksum.
    """
    content = _decode_text(path, cure)
    expected = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
    try:
        if expected is not None and expected != checksum_of(content):
            raise UserError(
                f"{path} does not match its checksum: it was damaged or edited; {cure} (if you "
                f'edited it, remove its line "{CHECKSUM}")'
            )
        return msgspec.convert(change(content), schema, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}); {cure}") from None


def _decode_text(path: Path, cure: str) -> Any:
    try:
        if not paths.on_bucket(path) and path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES:,} bytes; {cure}")
        with paths.os_errors(path):
            content = path.read_bytes()
        return msgspec.json.decode(content)
    except FileNotFoundError:
        raise
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}); {cure}") from None


def checksum_of(record: Any) -> str:
    """Return the checksum of a JSON value."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def file_checksum(path: Path) -> str:
    """Return the checksum of the bytes of a file. Raises OSError."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with paths.os_errors(path), path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
