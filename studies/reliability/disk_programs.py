"""The programs that read a run, where nothing can be written."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from studies.programs import Running
from studies.reliability import endings
from studies.reliability.endings import MACHINE, Result
from studies.reliability.mounts import Disk
from studies.reliability.tiny import Whole, environment

SHARES = (0.0, 0.3, 0.6, 0.9)  # of the space that a program needs


class Program(NamedTuple):
    """A program that reads the run `{run}`."""

    name: str
    arguments: tuple[str, ...]
    writes: str | None  # a file or folder, which must not be there in parts


READERS = (
    Program("evaluate", ("--workdir={run}",), "{run}/evaluation.json"),
    Program("sample", ("--workdir={run}", "--prompt=the ", "--max_new_tokens=4"), None),
    Program("export", ("--workdir={run}", "--out={disk}/exported"), "{disk}/exported"),
    Program("analyze", ("--workdir={run}", "--prompt=the tokens"), "{run}/analysis"),
)


def tried(whole: Whole, disk: Disk) -> Iterator[Result]:
    """Every program on a full disk, a nearly full one, and a read-only one."""
    disk.empty()
    run = disk.path / "run"
    shutil.copytree(whole.workdir, run, ignore=shutil.ignore_patterns("cache"))
    (run / "cache").symlink_to(whole.workdir / "cache")
    for one in READERS:
        yield from Reading(one, run, disk, environment(whole.corpus)).tried()
    shutil.rmtree(run)


class Reading(NamedTuple):
    """A program that reads a run on a disk that fails."""

    program: Program
    run: Path
    disk: Disk
    environment: dict[str, str]

    def tried(self) -> Iterator[Result]:
        """With space, without, and with some."""
        name, writes = self.program.name, self.program.writes is not None
        needed, wrong = self._needed()
        yield Result(name, "with plenty of space", wrong)
        for share in (SHARES if needed > 2**16 else SHARES[:1]) if writes else ():
            self.disk.leave(int(share * needed))
            wrong = self._ended(MACHINE)
            yield Result(name, f"disk full at {share:.0%} of what it writes", wrong)
            self._remove()
            yield Result(name, "again, with space", self._needed()[1])
        if not writes:
            self.disk.leave(0)
            yield Result(name, "disk full", self._ended({0}))
        with self.disk.read_only():
            yield Result(name, "disk read-only", self._ended(MACHINE if writes else {0}))

    def _needed(self) -> tuple[int, list[str]]:
        """Bytes that it writes, and what is wrong with its end; what it wrote is removed."""
        self.disk.empty()
        before = self.disk.free()
        wrong = self._ended({0})
        size = before - self.disk.free()
        self._remove()
        return size, wrong

    def _ended(self, codes: set[int]) -> list[str]:
        given = [self._filled(argument) for argument in self.program.arguments]
        running = Running(self.program.name, *given, environment=self.environment)
        return endings.wrong(endings.end(running), codes) + _not_whole(self.disk.path)

    def _filled(self, text: str) -> str:
        return text.format(run=self.run, disk=self.disk.path)

    def _remove(self) -> None:
        if self.program.writes is not None:
            path = Path(self._filled(self.program.writes))
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _not_whole(folder: Path) -> list[str]:
    """Files that were left in parts."""
    told = []
    for path in folder.rglob("*"):
        if "partial" in path.name:
            told.append(f"{path.name} is left behind")
        if path.suffix == ".json":
            with contextlib.suppress(FileNotFoundError):
                try:
                    json.loads(path.read_text())
                except ValueError:
                    told.append(f"{path.name} is not whole")
    return told[:3]
