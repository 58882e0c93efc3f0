"""Stopping of a run by Ctrl-C or SIGTERM: at once, with all completed steps saved."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from nrgpt_jax.errors import FAILED, STOPPED, stopped_by
from nrgpt_jax.processes import log_host0

Item = TypeVar("Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2.0  # seconds for the main thread to respond by itself


class Stop:
    """A context manager that requests a stop after Ctrl-C or SIGTERM to any process.

    The loop polls between two steps and between the batches of an evaluation. If the main thread
    cannot poll because a program is being compiled, a watcher thread responds: before the first
    step there is nothing to save, and it exits at once; in an evaluation it saves the state first
    (`rescuing`). A second signal kills the process at once.

    Joined processes agree on the step through JAX's preemption service; they respond when all of
    them have polled.
    """

    def __init__(self):
        self.happened = False
        self.exit_code = 0
        self._joined = jax.distributed.is_initialized()
        self._previous: dict[int, Any] = {}
        self._asked = 0
        self._begun = False
        self._free = threading.Event()  # cleared while the main thread may be blocked for long
        self._free.set()
        self._rescue: Callable[[], None] | None = None
        self.saving = threading.RLock()  # held while saving

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        if self._joined:  # JAX handles SIGTERM
            terminate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, terminate)
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous and not self._joined:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)  # ends the watcher thread

    def begin(self) -> None:
        """Mark that a step is complete: from now on there is something to save."""
        self._begun = True

    def asked(self) -> bool:
        """Return whether to stop now. All processes call it at the same points of the run."""
        self._asked += 1
        if self._joined and multihost_utils.reached_preemption_sync_point(self._asked):
            self.happened, self.exit_code = True, STOPPED
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log_host0("\nstopping here on all processes, and saving; once more to stop at once")
        return self.happened

    def cuts_short(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, but at most one after a stop was requested."""
        for item in items:
            yield item
            if self.asked():
                return

    @contextlib.contextmanager
    def rescuing(self, save: Callable[[], None]) -> Iterator[None]:
        """Let the watcher thread call `save` if a signal arrives while the main one is blocked."""
        self._rescue = save
        self._free.clear()
        try:
            yield
        finally:
            with self.saving:
                self._rescue = None
            self._free.set()

    def _note(self, number: int, frame) -> None:
        del frame
        self.happened, self.exit_code = True, stopped_by(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._begun:
            log_host0("\nstopping after this step and saving; once more to stop at once")

    def _rescued(self, save: Callable[[], None], number: int) -> tuple[str, int]:
        """Save; return the message and the exit code."""
        try:
            save()
        except Exception as error:  # a full disk or a non-finite state, reported only here
            return f"error: stopped, and the last steps are not saved: {error}", FAILED
        return "stopped and saved; the same command resumes from there", stopped_by(number)

    def _watch(self) -> None:
        """Respond to signals that the main thread cannot handle.

        Python calls `_note` only between bytecode instructions; the operating system notifies this
        thread directly.
        """
        with contextlib.suppress(OSError):
            while byte := os.read(self._read, 1):
                if byte[0] in SIGNALS:
                    self._answer(byte[0])
        os.close(self._read)

    def _answer(self, number: int) -> None:
        if self._begun and self._free.wait(PATIENCE):
            return  # the main thread responds
        with self.saving:
            text, code = "stopped before the first step: nothing is lost", stopped_by(number)
            if self._begun:
                if self._rescue is None:
                    return  # the main thread is no longer blocked
                text, code = self._rescued(self._rescue, number)
            sys.stderr.write(f"\n{text}\n")
            sys.stderr.flush()
            os._exit(code)
