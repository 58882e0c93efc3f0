"""Local and bucket (gs://) paths of run directories, with the methods of pathlib.

`etils.epath` and orbax access Google Cloud Storage by fsspec and tensorstore. A bucket has no
folders, no renaming and no appending: an object appears as a whole once it is written.
"""

import contextlib
import errno
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nrgpt_jax.errors import UserError

BUCKET = "gs://"


def as_path(name: str | os.PathLike[str]) -> Path:
    """Return a local path, or a path on a bucket (`gs://BUCKET/FOLDER`).

    Raises:
      UserError: the name is another kind of URL, or gcsfs is not installed.
    """
    text = os.fspath(name)
    if "://" not in text:
        return Path(text)
    if not text.startswith(BUCKET):
        raise UserError(
            f"{text} is no place for a run: a folder, or gs://BUCKET/FOLDER; mount storage of "
            "another kind"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} needs gcsfs: pip install 'nrgpt-jax[gcs]'")
    import fsspec
    from etils import epath

    # Tensorstore and other hosts write without fsspec: a cached listing would be stale.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    path: Any = epath.Path(text)
    return path


def on_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is on a bucket."""
    return os.fspath(path).startswith(BUCKET)


def on_this_machine(name: str | os.PathLike[str]) -> Path:
    """Return a local path. Raises UserError for a path on a bucket."""
    path = as_path(name)
    if on_bucket(path):
        raise UserError(f"{path} is on a bucket; name a folder of this machine")
    return path


def absolute(path: Path) -> Path:
    """Return the absolute path."""
    return path if on_bucket(path) else path.absolute()


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn exceptions of the bucket's libraries, of many types, into a one-line OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(errno.EIO, reason, str(path)) from None


def files(folder: Path) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it."""
    if on_bucket(folder):
        with os_errors(folder):
            fs, root = _filesystem(folder)
            return sorted(name.removeprefix(root).lstrip("/") for name in fs.find(root))
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def remove(folder: Path) -> None:
    """Remove a folder with its contents, if it exists. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), os_errors(folder):
        if on_bucket(folder):
            fs, root = _filesystem(folder)
            fs.rm(root, recursive=True)
        else:
            shutil.rmtree(folder)


def discard(folder: Path) -> None:
    """Remove a folder, ignoring any OSError."""
    with contextlib.suppress(OSError):
        remove(folder)


def move(folder: Path, target: Path) -> None:
    """Move a folder to a path that does not exist yet. Raises OSError."""
    if on_bucket(folder):
        with os_errors(folder):
            fs, root = _filesystem(folder)
            fs.copy(root, _filesystem(target)[1], recursive=True)
            fs.rm(root, recursive=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)


def _filesystem(path: Path) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))
