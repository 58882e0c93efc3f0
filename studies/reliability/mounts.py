"""A disk of its own, that can be full or read-only: a tmpfs, which only root can mount."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = 32 * 2**20  # bytes


class CannotMount(Exception):
    """This user may not, or this system has no tmpfs."""


class Disk:
    """A mounted tmpfs, part of which can be taken up."""

    def __init__(self, path: Path):
        self.path = path
        self._filler = path / ".filler"

    def free(self) -> int:
        """Bytes."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def empty(self) -> None:
        """Gives all space back that was taken up."""
        self._filler.unlink(missing_ok=True)

    def leave(self, free: int) -> None:
        """Takes up all but so many bytes, whatever others write meanwhile."""
        self.empty()
        with self._filler.open("wb") as file:
            while (taken := self.free() - free) > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), taken)
                except OSError as error:
                    if error.errno != errno.ENOSPC:  # others were faster
                        raise

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written inside."""
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True)


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    """An empty disk, at a new folder. Raises CannotMount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    if shutil.which("mount") is None:
        raise CannotMount("there is no program mount")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotMount(" ".join(done.stderr.split()) or "mount fails")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
        path.rmdir()
