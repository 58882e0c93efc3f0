"""What orbax says when it fails: once, and in one line."""

import contextlib
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator

from absl import logging as absl_logging

_OF_THE_MACHINE = ("No space left on device", "Read-only file system", "Permission denied")


def failure(call: Callable[[], object]) -> str:
    """Calls a function of orbax; returns what went wrong, in one line, and "" where nothing did.

    What fails in its threads and event loops is raised by it too: they do not print it.
    """
    with _quiet():
        try:
            call()
            return ""
        except Exception as error:  # orbax and tensorstore raise many kinds
            found = reason(error)
        gc.collect()  # tasks that have failed complain while they are removed, as the error is now
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = absl_logging.get_absl_logger(), logging.getLogger("asyncio")
    hooks = sys.unraisablehook, threading.excepthook
    for logger in loggers:
        logger.addFilter(_without_traceback)
    sys.unraisablehook = _ignore
    threading.excepthook = _ignore
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks
        for logger in loggers:
            logger.removeFilter(_without_traceback)


def _ignore(_: object) -> None:
    """Instead of printing."""


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def reason(error: Exception) -> str:
    """An error in one line, without what only its library understands where that is known."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in _OF_THE_MACHINE:
        if known.lower() in text.lower():
            return known
    return text[:200]
