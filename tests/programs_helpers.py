"""Runs `python -m nrgpt_jax.NAME ...` in processes of their own that need not import JAX again."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("cli", "training.loop", "generation.exported", "analysis.report")  # all but programs

# Its server imports the parts once, and is forked for every program before JAX has started.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([f"nrgpt_jax.{part}" for part in PARTS])


class Done(NamedTuple):
    """What is left of a program."""

    returncode: int | None
    stdout: str
    stderr: str


def program(name: str, *arguments: object) -> Done:
    """Runs a program to its end, in the root of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = _processes.Process(target=_run, args=(name, [*map(str, arguments)], streams))
        process.start()
        process.join()
        return Done(process.exitcode, *(stream.read_text() for stream in streams))


def _run(name: str, arguments: list[str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.argv = [name, *arguments]
    runpy.run_module(f"nrgpt_jax.{name}", run_name="__main__", alter_sys=True)
