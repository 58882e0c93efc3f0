"""What the processes of a run agree on; with a single process all of it is trivial.

All processes run the same program on their own devices. The first one writes what a run writes
(but for checkpoints, which all write together).
"""

import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.directory import differences

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


def one_ahead(function: Callable[[], Result]) -> Result:
    """Calls a function on the first process, then on the others, which find what it has made.

    Raises what `agreed` does.
    """
    ahead = agreed(function if is_first() else lambda: None)
    after = agreed((lambda: None) if is_first() else function)
    return ahead if is_first() else after  # type: ignore[return-value]


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


def check_same(config: Mapping[str, Any]) -> None:
    """Raises UserError, on all processes, where one has another configuration or other data."""
    texts = gather_texts(json.dumps(config))
    for index, text in enumerate(texts):
        if text != texts[0]:
            first, *_ = differences(json.loads(texts[0]), json.loads(text))
            raise UserError(
                f"processes 0 and {index} were not started alike: {first}; start all of them with "
                "the same command and the same data"
            )


def check_shared(workdir: Path) -> None:
    """Raises UserError, on all processes, where they do not see the same run directory."""
    if jax.process_count() == 1:
        return
    mark, token = workdir / "mark", gather_texts(uuid.uuid4().hex)[0]
    by_first(lambda: mark.write_text(token))

    def check() -> None:
        if not mark.exists() or mark.read_text() != token:
            raise UserError(f"{workdir} is not one folder that all hosts share; name another one")

    agreed(check)
    by_first(mark.unlink)


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

    def after(self, step: int) -> None:
        """Looks whether it has happened; called by every process after every step.

        Orbax asks the same service when it saves, with the number of the step: so does this.
        """
        if self._joined and multihost_utils.reached_preemption_sync_point(step):
            self.happened = self.by_terminate = True
            say("\nstopping after this step on all processes, and saving")

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
