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
        yield from _tried(one, run, disk)
    shutil.rmtree(run)


def _tried(one: Program, run: Path, disk: Disk) -> Iterator[Result]:
    needed, wrong = _needs(one, run, disk)
    yield Result(one.name, "with plenty of space", wrong)
    if one.writes is None:
        yield Result(one.name, "disk full", _wrong(one, run, disk, 0, {0}))
    else:
        for share in SHARES if needed > 2**16 else SHARES[:1]:
            stage = f"disk full at {share:.0%} of what it writes"
            yield Result(one.name, stage, _wrong(one, run, disk, int(share * needed), MACHINE))
            yield Result(one.name, "again, with space", _needs(one, run, disk)[1])
    with disk.read_only():
        codes = {0} if one.writes is None else MACHINE
        yield Result(one.name, "disk read-only", _ended(one, run, disk, codes))


def _needs(one: Program, run: Path, disk: Disk) -> tuple[int, list[str]]:
    """Bytes that a program writes, and what is wrong with its end; what it wrote is removed."""
    disk.empty()
    before = disk.free()
    wrong = _ended(one, run, disk, {0})
    size = before - disk.free()
    _remove(one, run, disk)
    return size, wrong


def _wrong(one: Program, run: Path, disk: Disk, free: int, codes: set[int]) -> list[str]:
    """What is wrong with a program for which so many bytes are free."""
    disk.leave(free)
    wrong = _ended(one, run, disk, codes)
    disk.empty()
    _remove(one, run, disk)
    return wrong


def _ended(one: Program, run: Path, disk: Disk, codes: set[int]) -> list[str]:
    given = [argument.format(run=run, disk=disk.path) for argument in one.arguments]
    done = endings.end(Running(one.name, *given, environment=environment()))
    return endings.wrong(done, codes) + _not_whole(disk.path)


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


def _remove(one: Program, run: Path, disk: Disk) -> None:
    if one.writes is not None:
        path = Path(one.writes.format(run=run, disk=disk.path))
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
