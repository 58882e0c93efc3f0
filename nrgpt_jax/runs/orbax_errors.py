"""What orbax says when it fails: once, and in one line."""

import contextlib
import gc
import logging
import sys
import threading
from collections.abc import Iterator

from absl import logging as absl_logging

_OF_THE_MACHINE = ("No space left on device", "Read-only file system", "Permission denied")


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """What fails in threads and event loops of orbax is raised by it too: they do not print it."""
    loggers = absl_logging.get_absl_logger(), logging.getLogger("asyncio")
    hooks = sys.unraisablehook, threading.excepthook
    for logger in loggers:
        logger.addFilter(_without_traceback)
    sys.unraisablehook = _ignore
    threading.excepthook = _ignore
    try:
        yield
    except Exception:
        gc.collect()  # what they left behind complains while it is removed
        raise
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
