"""Files of a corpus, at any location that fsspec supports: local, gs://, s3://, hf://, https://.

fsspec lists and opens files. This module selects and orders them, because the split of documents
depends on names, and reports errors in one line, because fsspec's errors differ by file system.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import fsspec

from nrgpt_jax.errors import UserError

BOM = b"\xef\xbb\xbf"  # the UTF-8 byte order mark, which is not text

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "hf": "hf", "http": "http", "https": "http"}


class File(NamedTuple):
    """A file of a corpus."""

    path: str  # as fsspec opens it
    name: str  # relative to the corpus, with /
    size: int
    modified: int = 0  # nanoseconds; 0 if unknown


def is_remote(place: str) -> bool:
    """Return whether a place is a URL rather than a path."""
    return "://" in place


def absolute(place: str) -> str:
    """Return the place as a URL or an absolute path."""
    return place if is_remote(place) else str(Path(place).expanduser().resolve())


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Return whether a name has one of the endings, ignoring case."""
    return name.lower().endswith(endings)


def list_files(place: str, endings: tuple[str, ...]) -> list[File]:
    """Return the file at a path or URL, or all files below it with one of the endings.

    Files and folders below it whose names begin with a dot are skipped. The files are sorted by
    name, folder by folder: `part/one.txt` before `part.txt`.

    Raises:
      UserError: the place does not exist, has no such file, or cannot be listed; the message
        says what is missing: a package, a bucket, credentials.
    """
    files = []
    with _explained(place):
        if is_remote(place):
            system, root = fsspec.core.url_to_fs(place)
        else:
            system, root = fsspec.filesystem("file"), os.path.abspath(Path(place).expanduser())
        listed = system.find(root, detail=True) or {root: system.info(root)}
        for path, about in listed.items():
            about = system.info(path) if about.get("size") is None else about  # https
            itself = path == root
            name = path.rpartition("/")[2] if itself else path.removeprefix(root.rstrip("/") + "/")
            hidden = any(part.startswith(".") for part in name.split("/"))
            if about["type"] == "directory" or not (
                itself or (has_ending(name, endings) and not hidden)
            ):
                continue
            if is_remote(place):
                files.append(File(system.unstrip_protocol(path), name, about["size"] or 0))
            elif os.path.isfile(path):
                status = os.stat(path)
                files.append(File(path, name, status.st_size, status.st_mtime_ns))
    if not files:
        raise UserError(f"data.path={place} has no {' or '.join(endings)} files below it")
    return sorted(files, key=lambda file: file.name.split("/"))


@contextlib.contextmanager
def opened(path: str, compression: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes.

    Args:
      path: the path of a `File`.
      compression: as in fsspec; "infer" decompresses a file that ends in .gz.

    Raises:
      UserError: the file is missing, truncated, or cannot be read.
    """
    with _explained(path), fsspec.open(path, "rb", compression=compression) as file:
        yield file


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turn errors about a place into a UserError of one line."""
    remote = is_remote(place)
    try:
        yield
        return
    except UserError:
        raise
    except FileNotFoundError:
        reason = "does not exist or cannot be reached" if remote else "does not exist"
    except ImportError as error:
        extra = EXTRAS.get(place.partition("://")[0])
        cure = f".venv/bin/python -m pip install -e '.[{extra}]'" if extra else "install it"
        reason = f"needs a package that is missing ({_line(error)}); {cure}"
    except EOFError:
        reason = "is cut short; fetch it again"
    except Exception as error:
        if not remote and not isinstance(error, OSError):
            raise
        # gcsfs, s3fs, aiohttp and huggingface_hub each raise their own error types
        cure = "the address, your credentials and the network" if remote else "its permissions"
        reason = f"cannot be read ({_line(error)}); check {cure}"
    raise UserError(f"{place if remote else f'data.path={place}'} {reason}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
