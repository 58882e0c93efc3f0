"""Disks that are full or read-only, deleted folders, wrong clocks.

A full disk is a tmpfs, which only root can mount; otherwise these cases are skipped. The
compilation cache is on another disk, so that only the output of a run fills it.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nrgpt_jax.errors import FAILED
from studies.programs import Running
from studies.reliability import judge, runs
from studies.reliability.moments import CHECKPOINT_EVERY, EVAL_EVERY, after_step, drawn
from studies.reliability.report import Part
from studies.reliability.runs import RESUMED, Case, Disturbance, Result, Whole

SIZE = 32 * 2**20  # bytes of the disk
KILLED, SPARE = 137, 2**17  # exit code; bytes that a run needs beyond its final size
SHARES = (0.0, 0.3, 0.6, 0.9)  # of the space that a program needs
SOON = 3.0  # seconds
CLOCKS: dict[str, Callable[[float, float], float]] = {  # (beginning, now) -> time shown
    "backwards": lambda begin, now: begin - 2.0 * (now - begin),
    "set back by an hour": lambda begin, now: now - 3600.0 * (now > begin + SOON),
    "set forward by an hour": lambda begin, now: now + 3600.0 * (now > begin + SOON),
}
READERS = (  # program, arguments, and its output, which must never be partial
    ("evaluate", ("--workdir={run}",), "run/evaluation.json"),
    ("sample", ("--workdir={run}", "--prompt=the ", "--max_new_tokens=4"), None),
    ("export", ("--workdir={run}", "--out={disk}/exported"), "exported"),
    ("analyze", ("--workdir={run}", "--prompt=the tokens"), "run/analysis"),
)


class Disk:
    """A mounted tmpfs, part of which can be filled."""

    def __init__(self, path: Path):
        self.path = path

    def free(self) -> int:
        """Return the free bytes."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    @contextlib.contextmanager
    def only(self, free: int) -> Iterator[None]:
        """Fill the disk, also during concurrent writes, until only `free` bytes are left."""
        filler = self.path / ".filler"
        with filler.open("wb") as file:
            while (taken := self.free() - free) > 0:
                with contextlib.suppress(OSError):  # another process took the space first
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), taken)
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Mount the disk read-only inside the context."""
        mount("-o", "remount,ro", self.path)
        try:
            yield
        finally:
            mount("-o", "remount,rw", self.path)


def mount(*arguments: object) -> None:
    """Run `mount`. Raises CalledProcessError if this user may not mount."""
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    """Mount an empty disk at a new folder. Raises CalledProcessError or OSError."""
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", path)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def run(cases: int, seed: int, jobs: int) -> dict[str, Any]:
    """Disks, folders and clocks.

    As documented: the program ends with exit code 1 and one line of error if nothing can be
    written, and every file under its final name is complete. Once there is space, the same command
    resumes and ends bit-identical to an undisturbed run. The columns count the states in which runs
    were disturbed, by the content of the run directory. The other programs meet a disk with room
    for 0% to 90% of their output.
    """
    del jobs
    skipped = ""
    with runs.undisturbed() as whole, contextlib.ExitStack() as stack:
        results = runs.run_all(whole, without_disk())
        try:
            disk = stack.enter_context(mounted(whole.workdir.parent / "disk"))
        except (OSError, subprocess.CalledProcessError) as error:
            skipped = f"Disks are left out, because none can be mounted here: {error}."
        else:
            on_disk = with_disk(disk, whole, cases, np.random.default_rng(seed))
            results += runs.run_all(whole, on_disk, disk.path)
            results += reading(disk, whole)
    return {"skipped": skipped, **runs.counted(results)}


def without_disk() -> Iterator[Case]:
    """Yield cases of a run directory deleted during training, and of wrong clocks."""
    delete = lambda running, workdir: shutil.rmtree(workdir.rename(f"{workdir}.gone"), True)
    for step in (1, 2 * CHECKPOINT_EVERY + 1, 3 * EVAL_EVERY):
        deleted = Disturbance({FAILED}, when=after_step(step), act=delete)
        yield Case("run directory deleted", [deleted, RESUMED])
    for how in CLOCKS:
        yield Case(f"clock {how}", [Disturbance({0}, before=functools.partial(set_clock, how))])


def set_clock(how: str) -> None:
    """Patch the clock of this process."""
    begin, right = time.time(), time.time
    time.time = lambda: CLOCKS[how](begin, right())
    time.time_ns = lambda: int(1e9 * time.time())


def with_disk(disk: Disk, whole: Whole, cases: int, random: np.random.Generator) -> Iterator[Case]:
    """Yield trainings on a disk that becomes full, is full temporarily, or is read-only."""
    failing = Disturbance({FAILED}, check=lambda workdir, done: judge.unreadable(workdir))
    for free in sizes(whole.workdir, cases):
        full = failing._replace(codes={0, FAILED}, around=functools.partial(disk.only, free))
        yield Case("a disk that becomes full", [full, RESUMED])
    for _ in range(cases // 4):
        act = functools.partial(full_for, disk, random.uniform(0.0, 1.0))
        full = failing._replace(codes={0, FAILED}, when=drawn(random, whole.warm), act=act)
        yield Case("a disk that is full for up to a second", [full, RESUMED])
    kill = Disturbance({KILLED}, when=after_step(3 * CHECKPOINT_EVERY + 1), act=runs.send(9))
    kept = failing._replace(around=disk.read_only)
    yield Case("a folder that is read-only when a killed run resumes", [kill, kept, RESUMED])


def sizes(workdir: Path, count: int) -> list[int]:
    """Return `count` sizes of free space in bytes: a quarter page by page, for the first small
    files; the rest evenly up to the size of a run."""
    files = [path.stat() for path in workdir.rglob("*") if workdir / "cache" not in path.parents]
    needed = sum(512 * file.st_blocks for file in files) + SPARE
    pages = [page * os.sysconf("SC_PAGE_SIZE") for page in range(count // 4)]
    return pages + [int(free) for free in np.linspace(0, needed, count - len(pages) + 1)[1:]]


def full_for(disk: Disk, seconds: float, running: Running, workdir: Path) -> None:
    """Fill the disk for some seconds."""
    with disk.only(0):
        time.sleep(seconds)


def reading(disk: Disk, whole: Whole) -> Iterator[Result]:
    """Yield the results of programs that read a run: with space, disk full, and read-only."""
    run = disk.path / "run"
    shutil.copytree(whole.workdir, run, ignore=shutil.ignore_patterns("cache"))
    (run / "cache").symlink_to(whole.workdir / "cache")
    for program, arguments, written in READERS:
        given = [program, *(a.format(run=run, disk=disk.path) for a in arguments)]
        code, ended = FAILED if written else 0, functools.partial(_ended, disk, whole, given)
        target = disk.path / (written or "nothing")
        result, needed = ended(target, "with space", contextlib.nullcontext(), 0)
        yield result
        for share in SHARES if needed > 2**16 else SHARES[:1]:
            yield ended(target, "disk full", disk.only(int(share * needed)), code)[0]
            yield ended(target, "with space", contextlib.nullcontext(), 0)[0]
        yield ended(target, "disk read-only", disk.read_only(), code)[0]


def _ended(
    disk: Disk, whole: Whole, given: list[str], target: Path, how: str, around: Any, code: int
) -> tuple[Result, int]:
    """Run a program, remove its output, and return its result and the bytes written."""
    before = disk.free()
    with around:
        done = runs.end(Running(*given, environment=whole.environment()))
        wrong = runs.wrong_end(done, {code})
        for folder in (disk.path / "run", disk.path / "exported"):
            wrong += judge.unreadable(folder)
        wrong += [f"{path} is left behind" for path in disk.path.rglob("*partial*")]
    needed = before - disk.free()
    target.unlink() if target.is_file() else shutil.rmtree(target, ignore_errors=True)
    return Result(f"{given[0]}, {how}", [], [], wrong), needed


PART = Part("what happened", 40, run)
