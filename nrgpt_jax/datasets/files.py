"""Files of a corpus, wherever fsspec finds them: local, gs://, s3://, hf://, https://."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import fsspec

from nrgpt_jax.errors import UserError

# Only .gz is read packed, and only JSON lines of it: the size of a text is that of its file.
PACKED = (
    *(".gz", ".bz2", ".xz", ".zip", ".zst", ".lzma", ".lz4", ".z", ".snappy", ".7z", ".rar"),
    *(".tar", ".tgz", ".tbz2", ".txz"),
)

BOM = b"\xef\xbb\xbf"  # a mark of UTF-8 at the beginning of a file, which is no text

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "hf": "hf", "http": "http", "https": "http"}


class File(NamedTuple):
    """A file of a corpus."""

    path: str  # as fsspec opens it
    name: str  # below the place of the corpus, with /
    size: int
    modified: int = 0  # nanoseconds; 0 where that is not known


def is_remote(place: str) -> bool:
    """Whether a place is an address rather than a path."""
    return "://" in place


def absolute(place: str) -> str:
    """The place, findable from any working directory."""
    return place if is_remote(place) else str(Path(place).expanduser().resolve())


def is_packed(name: str) -> bool:
    """Whether the ending of a name says that the file is compressed or an archive."""
    return has_ending(name, PACKED)


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a name has one of the endings, in small letters or capitals."""
    return name.lower().endswith(endings)


def _is_hidden(name: str) -> bool:
    """Whether the file, or a folder that it is in below the corpus, begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def list_files(place: str, endings: tuple[str, ...]) -> list[File]:
    """The file of this path or address, or all below it with one of the endings.

    Files and folders below it whose names begin with a dot are left out. The others are in the
    order of their names, folder by folder: `part/one.txt` before `part.txt`.

    Raises:
      UserError: the place does not exist, holds none, or cannot be listed; the message says what
        is missing: a package, a bucket, credentials.
    """
    files = _remote_files(place, endings) if is_remote(place) else _local_files(place, endings)
    if not files:
        kinds = " or ".join(endings)
        raise UserError(f"data.path={place} has no {kinds} files below it")
    return sorted(files, key=lambda file: file.name.split("/"))


def _local_files(place: str, endings: tuple[str, ...]) -> list[File]:
    root = Path(place).expanduser()
    with _explained(place):
        if not root.exists():
            raise FileNotFoundError(place)
        if not root.is_dir():
            return [_local_file(root, root.parent)]
        below = [path for path in root.rglob("*") if has_ending(path.name, endings)]
        files = [_local_file(path, root) for path in below if path.is_file()]
        return [file for file in files if not _is_hidden(file.name)]


def _local_file(path: Path, base: Path) -> File:
    status = path.stat()
    name = path.relative_to(base).as_posix()
    return File(str(path), name, status.st_size, status.st_mtime_ns)


def _remote_files(place: str, endings: tuple[str, ...]) -> list[File]:
    with _explained(place):
        system, root = fsspec.core.url_to_fs(place)
        result = system.find(root, detail=True) or _itself(system, root)
        base = "" if root in result else root.rstrip("/") + "/"
        return [
            File(system.unstrip_protocol(path), _below(path, base), about["size"] or 0)
            for path, about in result.items()
            if path == root or (has_ending(path, endings) and not _is_hidden(_below(path, base)))
        ]


def _itself(system, root: str) -> dict[str, dict]:
    return {root: system.info(root)}


def _below(path: str, base: str) -> str:
    return path.removeprefix(base) if base else path.rpartition("/")[2]


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file, opened to read bytes; one that ends in .gz is unpacked on the way.

    Raises:
      UserError: it is not there, or breaks off while it is read.
    """
    compression = "gzip" if has_ending(path, (".gz",)) else None
    with _explained(path), fsspec.open(path, "rb", compression=compression) as file:
        yield file


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turns what goes wrong with a place into one line."""
    named = place if is_remote(place) else f"data.path={place}"
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except FileNotFoundError:
        why = "does not exist or cannot be reached" if is_remote(place) else "does not exist"
        raise UserError(f"{named} {why}") from None
    except ImportError as error:
        extra = EXTRAS.get(place.partition("://")[0])
        cure = f".venv/bin/python -m pip install -e '.[{extra}]'" if extra else "install it"
        missing = f"{place} needs a package that is missing ({_line(error)})"
        raise UserError(f"{missing}; {cure}") from None
    except EOFError:
        raise UserError(f"{named} is cut short; fetch it again") from None
    except PermissionError as error:
        why = "check your credentials" if is_remote(place) else "check its permissions"
        raise UserError(f"{named} cannot be read ({_line(error)}); {why}") from None
    except OSError as error:
        raise UserError(f"{named} cannot be read: {_line(error)}") from None
    except Exception as error:
        if not is_remote(place):
            raise
        # gcsfs, s3fs, aiohttp and huggingface_hub each raise kinds of their own
        why = "check the address, your credentials and the network"
        raise UserError(f"{named} cannot be read ({_line(error)}); {why}") from None


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not error.args[2:]:
        return os.fspath(error.strerror)
    return " ".join(str(error).split())[:300] or type(error).__name__
