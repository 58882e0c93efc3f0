"""Stopping a run by Ctrl-C or SIGTERM: at once, and with all that was done saved."""

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
PATIENCE = 2.0  # seconds in which the main thread may answer by itself


class Stop:
    """Whether to stop: after the first Ctrl-C or SIGTERM, to any process. A context manager.

    The loop asks between two steps, and between the batches of an evaluation. Where the main
    thread cannot ask, because a program is being compiled, a thread that watches answers for it:
    before the first step there is nothing to save, and it leaves at once; in an evaluation it
    saves the state first (`rescuing`). A second signal kills the process at once.

    Processes that were joined agree on the moment through JAX's service for preemptions; they
    answer when all of them have asked.
    """

    def __init__(self):
        self.happened = False
        self.exit_code = 0
        self._joined = jax.distributed.is_initialized()
        self._previous: dict[int, Any] = {}
        self._asked = 0
        self._begun = False
        self._free = threading.Event()  # the main thread is not in what could take long
        self._free.set()
        self._rescue: Callable[[], None] | None = None
        self.saving = threading.RLock()  # held by whoever saves

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may look after signals
        if self._joined:  # JAX looks after SIGTERM
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
            os.close(self._write)  # ends the thread that watches

    def begin(self) -> None:
        """Says that a step was made: from now on there is something to save."""
        self._begun = True

    def asked(self) -> bool:
        """Whether to stop now. All processes ask at the same places in their course."""
        self._asked += 1
        if self._joined and multihost_utils.reached_preemption_sync_point(self._asked):
            self.happened, self.exit_code = True, STOPPED
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log_host0("\nstopping here on all processes, and saving; once more to stop at once")
        return self.happened

    def cuts_short(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, but only one after it has happened."""
        for item in items:
            yield item
            if self.asked():
                return

    @contextlib.contextmanager
    def rescuing(self, save: Callable[[], None]) -> Iterator[None]:
        """`save` is called by another thread if a signal finds the main one unable to answer."""
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
        """What to say, and the exit code."""
        try:
            save()
        except Exception as error:  # a full disk, a state that is not finite: nobody else knows
            return f"error: stopped, and the last steps are not saved: {error}", FAILED
        return "stopped and saved; the same command resumes from there", stopped_by(number)

    def _watch(self) -> None:
        """Answers signals that the main thread cannot.

        Python calls `_note` only between two of its own instructions; the operating system notifies
        this thread.
        """
        with contextlib.suppress(OSError):
            while byte := os.read(self._read, 1):
                if byte[0] in SIGNALS:
                    self._answer(byte[0])
        os.close(self._read)

    def _answer(self, number: int) -> None:
        if self._begun and self._free.wait(PATIENCE):
            return  # the main thread does it
        with self.saving:
            text, code = "stopped before the first step: nothing is lost", stopped_by(number)
            if self._begun:
                if self._rescue is None:
                    return  # it has just come back
                text, code = self._rescued(self._rescue, number)
            sys.stderr.write(f"\n{text}\n")
            sys.stderr.flush()
            os._exit(code)
