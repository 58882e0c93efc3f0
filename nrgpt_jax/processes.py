"""Coordination of the processes of a run; trivial with a single process.

All processes run the same program on their own devices. The first process writes all files of the
run except checkpoints, which all processes write together.
"""

import json
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nrgpt_jax.errors import UserError

Result = TypeVar("Result")


def is_first() -> bool:
    """Return whether this is the process that writes files and prints messages."""
    return jax.process_index() == 0


def log_host0(message: str) -> None:
    """Print a line to stderr, once for all processes."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def raise_on_all_hosts(function: Callable[[], Result]) -> Result:
    """Call a function on every process; if it fails on any process, raise on all.

    Raises:
      UserError: raised on this process, or on the first other process that failed.
      OSError: likewise; for programs, a failure of the machine, not of the user.
      Exception: any other exception of this process, reported to the others.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as failure:
        error = failure
    reported = "" if error is None else f"{error}" or type(error).__name__
    of_machine = not isinstance(error, UserError)
    messages = gather_texts(json.dumps([reported, of_machine]))
    if error is not None:
        raise error
    for index, (message, machine) in enumerate(map(json.loads, messages)):
        if message:
            kind = OSError if machine else UserError
            raise kind(f"process {index} stopped: {message}")
    return result  # type: ignore[return-value]


def host0_first(function: Callable[[], Result]) -> Result | None:
    """Call a function on the first process; the others wait, and return None.

    Raises the same errors as `raise_on_all_hosts`.
    """
    return raise_on_all_hosts(function if is_first() else lambda: None)


def one_ahead(function: Callable[[], Result]) -> Result:
    """Call a function on the first process, then on the others, which find its files.

    Raises the same errors as `raise_on_all_hosts`.
    """
    ahead = raise_on_all_hosts(function if is_first() else lambda: None)
    after = raise_on_all_hosts((lambda: None) if is_first() else function)
    return ahead if is_first() else after  # type: ignore[return-value]


def gather_texts(text: str) -> list[str]:
    """Return the texts of all processes, in process order."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(encoded)))
    padded = np.pad(encoded, (0, int(lengths.max()) + 1 - len(encoded)))
    every = multihost_utils.process_allgather(padded)
    return [
        bytes(row[:length]).decode() for row, length in zip(every, lengths.tolist(), strict=True)
    ]
