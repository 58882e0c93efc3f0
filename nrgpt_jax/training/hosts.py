"""What the processes of a run agree on; with a single process all of it is trivial.

All processes run the same program on their own devices. The first one writes what a run writes
(but for checkpoints, which all write together).
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nrgpt_jax.errors import UserError

Result = TypeVar("Result")
Item = TypeVar("Item")


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """A line for the person who watches, once for all processes."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def agreed(function: Callable[[], Result]) -> Result:
    """Calls a function on every process; where it fails on any, it fails on all.

    Raises:
      UserError: of this process, or the first of the others.
      Exception: another one of this process, of which the others have been told.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as failure:
        error = failure
    told = "" if error is None else f"{error}" or type(error).__name__
    messages = gather_texts(told)
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message:
            raise UserError(f"process {index} stopped: {message}")
    return result  # type: ignore[return-value]


def by_first(function: Callable[[], Any]) -> None:
    """Calls a function on the first process, while the others wait. Raises what `agreed` does."""
    agreed(function if is_first() else lambda: None)


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(encoded)))
    padded = np.pad(encoded, (0, int(lengths.max()) + 1 - len(encoded)))
    every = multihost_utils.process_allgather(padded)
    return [
        bytes(row[:length]).decode() for row, length in zip(every, lengths.tolist(), strict=True)
    ]


class Stop:
    """Whether to stop between two steps: after the first Ctrl-C or SIGTERM, to any process.

    Processes that were joined agree on the step through JAX's service for preemptions, and a
    second signal changes nothing; a single process acts at once on the second one. Use as a
    context manager.
    """

    def __init__(self):
        self.happened = False
        self.by_terminate = False  # by SIGTERM, which Ctrl-C is too for processes that were joined
        self._joined = jax.distributed.is_initialized()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if self._joined:  # JAX looks after SIGTERM
            terminate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, terminate)
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def after(self, step: int) -> bool:
        """Whether it has happened, asked by every process after every step.

        Orbax asks the same service when it saves, with the number of the step: so does this.
        """
        if self._joined and multihost_utils.reached_preemption_sync_point(step):
            self.happened = self.by_terminate = True
            say("\nstopping after this step on all processes, and saving")
        return self.happened

    def cuts_short(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, but none after a single process was told to stop."""
        for item in items:
            if self.happened:
                return
            yield item

    def _note(self, number, frame) -> None:
        del frame
        self.happened = True
        self.by_terminate = number == signal.SIGTERM
        signal.signal(number, self._previous[number])
        say("\nstopping after this step and saving; once more to stop at once")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
