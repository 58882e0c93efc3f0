"""Runs `python -m nrgpt_jax.NAME ...` in processes of their own that need not import JAX again."""

import multiprocessing
import os
import runpy
import subprocess
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


class Running:
    """A program that has been started in the root of the repository."""

    def __init__(self, name: str, *arguments: object, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / "stdout", Path(self._folder.name) / "stderr"]
        command = name, [*map(str, arguments)], self._streams, environment
        self._process = _processes.Process(target=_run, args=command)
        self._process.start()

    def send(self, number: int) -> None:
        """Sends a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def end(self, seconds: float | None = None) -> Done:
        """Waits for its end."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it has not ended"
        done = Done(self._process.exitcode, *(stream.read_text() for stream in self._streams))
        self._folder.cleanup()
        return done


def program(name: str, *arguments: object, **environment: str) -> Done:
    """Runs a program to its end."""
    return Running(name, *arguments, **environment).end()


def _run(name: str, arguments: list[str], streams: list[Path], environment: dict) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [name, *arguments]
    runpy.run_module(f"nrgpt_jax.{name}", run_name="__main__", alter_sys=True)


def run_python(code: str, devices: int) -> str:
    """What a program that may import these tests prints, with so many fake devices."""
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if "device_count" not in flag]
    count = f"--xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "XLA_FLAGS": " ".join([*flags, count]), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
