"""Run `python -m nrgpt_jax.NAME ...` in forked processes that need not import JAX again.

Tests and studies share them to watch programs, send signals and read how they ended.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("cli", "training.loop", "generation.exported", "analysis.report")  # all but programs
POLL = 0.005  # seconds

# The server imports the parts once, and is forked for every program before JAX is initialized.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([f"nrgpt_jax.{part}" for part in PARTS])
_lock = threading.Lock()  # multiprocessing polls all processes whenever it starts one


class Done(NamedTuple):
    """The exit code of a program, and its output."""

    returncode: int | None
    stdout: str
    stderr: str


class Running:
    """A running program, started in the root of the repository.

    Args:
      name: name of the program, such as `train`.
      arguments: its command-line arguments.
      environment: additional environment variables.
      before: function called in the program's process before it begins, to patch what it uses.
    """

    def __init__(
        self,
        name: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ):
        self._temporary = tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        command = name, [*map(str, arguments)], self._folder, before, dict(environment or {})
        self._process = _processes.Process(target=_run, args=command)
        with _lock:
            self._process.start()

    def wait_until_it_begins(self) -> float:
        """Wait until the program begins; return that time, by `time.monotonic`."""
        while not (self._folder / "begun").exists() and self.is_running():
            time.sleep(POLL / 5)
        return time.monotonic()

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with _lock:  # the system does not reuse a process id before the exit code is read
            if self._process.exitcode is None:
                assert self._process.pid is not None
                os.kill(self._process.pid, number)

    def is_running(self) -> bool:
        """Whether the process has not ended."""
        with _lock:
            return self._process.exitcode is None

    def _written(self, stream: str) -> str:
        path = self._folder / stream
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, seconds: float | None = None) -> Done:
        """Wait for the program to end. Raises TimeoutError after `seconds`."""
        begin = time.monotonic()
        while self.is_running():
            if seconds is not None and time.monotonic() - begin > seconds:
                raise TimeoutError(
                    f"not ended after {seconds} s: {self._written('stderr')[-2000:]}"
                )
            time.sleep(POLL)
        done = Done(self._process.exitcode, self._written("stdout"), self._written("stderr"))
        self._temporary.cleanup()
        return done


def program(name: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Done:
    """Run a program to its end."""
    return Running(name, *arguments, environment=environment).end()


def _run(
    name: str,
    arguments: list[str],
    folder: Path,
    before: Callable[[], object] | None,
    environment: dict[str, str],
) -> None:
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [name, *arguments]
    if before is not None:
        before()
    (folder / "begun").touch()
    runpy.run_module(f"nrgpt_jax.{name}", run_name="__main__", alter_sys=True)


def start_together(
    of_each: Sequence[Sequence[object]], environment: Mapping[str, str]
) -> list[Running]:
    """Start a multi-process training on localhost, each process with its own arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [f"--coordinator_address={address}", f"--num_processes={len(of_each)}"]
    return [
        Running("train", *given, *joined, f"--process_id={index}", environment=environment)
        for index, given in enumerate(of_each)
    ]


def devices(count: int, flags: str = "") -> dict[str, str]:
    """Return the environment of a process with N CPU devices and further XLA flags."""
    others = [flag for flag in flags.split() if "device_count" not in flag]
    wanted = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": " ".join([*others, wanted])}


def compiled_fast() -> str:
    """Return XLA flags for programs that run for milliseconds: fast compilation, slow code."""
    flags = "--xla_backend_optimization_level=0"
    if metadata.version("jaxlib").startswith("0.10."):  # XLA aborts on flags it does not know
        flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return flags


def arguments_of(fields: Mapping[str, object]) -> list[str]:
    """Return configuration fields as flags."""
    return [f"--config.{name}={value}" for name, value in fields.items()]
