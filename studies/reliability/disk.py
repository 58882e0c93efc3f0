"""Disks that are full or read-only, folders that vanish, clocks that are wrong.

A full disk is a tmpfs, which has to be mounted: without root it is left out. Compiled programs lie
on another disk, so that what fills it is what a run writes.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from studies.programs import Done, Running
from studies.reliability import disk_programs, endings, judge, moments, surroundings
from studies.reliability.endings import MACHINE, Result
from studies.reliability.mounts import CannotMount, Disk, mounted
from studies.reliability.tiny import CHECKPOINT_EVERY, Whole, undisturbed
from studies.tables import table

TITLE, CASES = "Disks, folders and clocks", 40  # sizes of a disk that are tried
SC_PAGE = os.sysconf("SC_PAGE_SIZE")


def run(cases: int = CASES, seed: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Tries everything, a full disk at so many sizes. Returns counts and what is wrong."""
    del jobs  # disks are few
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = undisturbed(folder)
        wanted = judge.read(whole.workdir)
        results = told(surroundings.tried(whole, wanted, folder))
        try:
            with mounted(folder / "disk") as disk:
                random = np.random.default_rng(seed)
                results += told(_with_disk(whole, wanted, disk, cases, random))
            skipped = ""
        except CannotMount as error:
            skipped = f"Disks are left out, because none can be mounted here: {error}."
    return {"skipped": skipped, **counted(results)}


def told(results: Iterable[Result]) -> list[Result]:
    """All of them, each printed when it is there."""
    found = []
    for one in results:
        found.append(one)
        print(f"{one.what}, {one.stage}: {one.wrong or 'as documented'}", flush=True)
    return found


def _with_disk(
    whole: Whole, wanted: judge.Run, disk: Disk, cases: int, random: np.random.Generator
) -> Iterator[Result]:
    again = Trained(whole, wanted, disk)
    for free in sizes(again.size(), cases):
        yield again.on_full_disk(free)
    for _ in range(cases // 4):
        yield again.full_for_a_while(moments.drawn(random, whole.warm), random.uniform(0.0, 1.0))
    yield again.read_only()
    yield from disk_programs.tried(whole, disk)


def sizes(whole: int, count: int) -> list[int]:
    """Free bytes to try: a quarter page by page, for the first small files; the rest up to all."""
    pages = [page * SC_PAGE for page in range(count // 4)]
    return pages + [int(free) for free in np.linspace(0, whole, count - len(pages) + 1)[1:]]


class Trained:
    """Trains on a disk that fails, and again when there is space."""

    def __init__(self, whole: Whole, wanted: judge.Run, disk: Disk):
        self.whole, self.wanted, self.disk = whole, wanted, disk
        self.workdir = disk.path / "run"

    def size(self) -> int:
        """Bytes that a run needs, and some more."""
        before = self.disk.free()
        self._prepare()
        endings.end(self._start())
        size = before - self.disk.free()
        shutil.rmtree(self.workdir)
        return size + 2**17

    def on_full_disk(self, free: int) -> Result:
        """So many bytes are free from the start on."""
        self._prepare()
        self.disk.leave(free)
        return self._judged("a disk that becomes full", endings.end(self._start()))

    def full_for_a_while(self, moment: moments.Moment, seconds: float) -> Result:
        """Nothing is free for some seconds in the course of the run."""
        self._prepare()
        self.disk.empty()
        running = self._start()
        moment(running, self.workdir)
        self.disk.leave(0)
        time.sleep(seconds)
        self.disk.empty()
        return self._judged("a disk that is full for up to a second", endings.end(running), {0, 1})

    def read_only(self) -> Result:
        """The run is to go on from a folder that cannot be written."""
        self._prepare()
        running = self._start()
        moments.in_evaluation(3 * CHECKPOINT_EVERY + 1, 0.0)(running, self.workdir)
        running.send(signal.SIGKILL)
        running.end()
        with self.disk.read_only():
            done = endings.end(self._start())
        return self._judged("train in a read-only folder", done)

    def _prepare(self) -> None:
        self.disk.empty()
        self.workdir.mkdir()
        (self.workdir / "cache").symlink_to(self.whole.workdir / "cache")

    def _start(self) -> Running:
        return self.whole.start(self.workdir)[0]

    def _judged(self, what: str, done: Done, codes: set[int] = MACHINE) -> Result:
        """Judges the failure, then goes on with space, judges the end and clears up."""
        stage = moments.stage(self.workdir)
        enough = done.returncode == 0 and not judge.differences(
            self.wanted, judge.read(self.workdir)
        )
        wrong = endings.wrong(done, {0} if enough else codes)
        wrong += unreadable(self.workdir)
        self.disk.empty()
        again = endings.end(self._start())
        wrong += endings.wrong(again, {0})
        if again.returncode == 0:
            wrong += judge.differences(self.wanted, judge.read(self.workdir), all_steps=False)
        shutil.rmtree(self.workdir)
        return Result(what, "there was enough" if enough else stage, wrong)


def unreadable(workdir: Path) -> list[str]:
    """Checkpoints and JSON files that are there under their names and cannot be read."""
    told = []
    for kind in judge.KINDS:
        for step in judge.steps_saved(workdir, kind):
            try:
                judge.read_checkpoint(workdir, kind, step)
            except Exception as error:  # whatever orbax raises
                told.append(f"{kind}/{step} cannot be read: {str(error)[: judge.SHORT]}")
    for path in workdir.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            told.append(f"{path.name} is not whole")
    return told


# The page -----------------------------------------------------------------------------------------


def counted(results: list[Result]) -> dict[str, Any]:
    """The figures."""
    rows: dict[tuple[str, str], list[int]] = {}
    for one in results:
        row = rows.setdefault((one.what, one.stage), [0, 0])
        row[0] += 1
        row[1] += not one.wrong
    return {
        "rows": [[*key, *row] for key, row in rows.items()],
        "wrong": [one._asdict() for one in results if one.wrong],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    return [
        "As documented: exit code 1 and one line of error where nothing can be written, and no "
        "file under its name that is not whole; once there is space, the same command resumes and "
        "ends bit by bit as a run that was left alone. " + found["skipped"],
        "",
        *table(["what happened", "where the run was", "tried", "as documented"], found["rows"]),
    ]
