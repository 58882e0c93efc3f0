"""Small files that are written whole or not at all, and are not believed when they are read.

A JSON file carries its own checksum (XXH3, 128 bits, of its content in canonical form: what an
editor does to white space and the order of fields does not matter). The schema of its content is
a type that msgspec checks.
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
MOST_BYTES = 64 * 2**20  # of a JSON file; a vocabulary of a million symbols is a third of it
_CHUNK = 2**20

Schema = TypeVar("Schema")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; one that holds this content already is left alone.

    Raises:
      OSError: it cannot be written; what was there before is still there.
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
    """Where to write a file that then takes its place at once; what fails leaves nothing.

    Raises:
      OSError: of the block, or in the end; it names the file.
    """
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # it may name no file, or partial
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes the names of a folder's files survive a loss of power."""
    with contextlib.suppress(OSError):  # some file systems have no such thing
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON file with its checksum. Raises what `write_whole` does."""
    complete = {**record, CHECKSUM: checksum_of(record)}
    write_whole(path, (json.dumps(complete, indent=1) + "\n").encode())


def read_json(
    path: Path,
    schema: type[Schema],
    cure: str,
    change: Callable[[Any], Any] = lambda content: content,
) -> Schema:
    """Reads a JSON file, through its schema. Files of older versions have no checksum.

    Args:
      path: the file.
      schema: the type of its content, as of `msgspec`, without the checksum.
      cure: what to do about a file that cannot be read; ends the message.
      change: of the content, before the schema sees it.

    Raises:
      FileNotFoundError: there is none.
      UserError: it cannot be read, is not what the schema says, or does not match its checksum.
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
    """The checksum of what JSON can hold."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def file_checksum(path: Path) -> str:
    """The checksum of a file's bytes. Raises OSError."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with paths.os_errors(path), path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
