"""Handling of Ctrl-C: a program ends with one line and exit code 130, at any time."""

import os
import signal
import sys
from typing import NoReturn

from nrgpt_jax.errors import stopped_by

INTERRUPTED = stopped_by(signal.SIGINT)
_PACKAGE = __name__.partition(".")[0]


def is_program() -> bool:
    """Return whether Python imports this package to run a program of it: python -m PACKAGE.NAME."""
    if sys.argv[:1] != ["-m"]:  # its value until the program itself starts
        return False
    words = [word.removeprefix("-m") for word in sys.orig_argv]
    return any(word == _PACKAGE or word.startswith(f"{_PACKAGE}.") for word in words)


def end_at_once() -> None:
    """Make Ctrl-C end the process immediately, when there is nothing to clean up."""
    signal.signal(signal.SIGINT, _end)


def raise_exception() -> None:
    """Make Ctrl-C raise KeyboardInterrupt, Python's default."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> NoReturn:
    del number, frame
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(INTERRUPTED)
