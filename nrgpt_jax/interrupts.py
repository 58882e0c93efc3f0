"""Ctrl-C ends a program in one line, whatever it is doing, with exit code 130."""

import os
import signal
import sys
from typing import NoReturn

from nrgpt_jax.errors import stopped_by

INTERRUPTED = stopped_by(signal.SIGINT)
_PACKAGE = __name__.partition(".")[0]


def is_program() -> bool:
    """Whether Python is importing this package to run a program of it: python -m PACKAGE.NAME."""
    if sys.argv[:1] != ["-m"]:  # what it is until the program itself begins
        return False
    words = [word.removeprefix("-m") for word in sys.orig_argv]
    return any(word == _PACKAGE or word.startswith(f"{_PACKAGE}.") for word in words)


def end_at_once() -> None:
    """From here on Ctrl-C ends the process at once: there is nothing to clear away."""
    signal.signal(signal.SIGINT, _end)


def raise_exception() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as Python has it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> NoReturn:
    del number, frame
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(INTERRUPTED)
