"""Errors of orbax, reported once and in one line."""

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable

from absl import logging as absl_logging

_OF_THE_MACHINE = ("No space left on device", "Read-only file system", "Permission denied")
_LIBRARIES = ("orbax", "asyncio", "concurrent")
_NAMES = ("asyncio", "concurrent.futures")
_LOGGERS = absl_logging.get_absl_logger(), *map(logging.getLogger, _NAMES)


def failure(call: Callable[[], object]) -> str:
    """Call a function of orbax; return its error in one line, or "" if it succeeds.

    The function also raises the errors of its threads and event loops, which therefore print none.
    """
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = _ignore
    threading.excepthook = _ignore
    for logger in _LOGGERS:
        logger.addFilter(_without_traceback)
    result = ""
    try:
        try:
            call()
        except Exception as error:  # orbax and tensorstore raise many types
            result = reason(error)
        if result:
            gc.collect()  # failed tasks log an error when they are deleted
        else:  # after a failure, keep the filters: other threads fail later
            for logger in _LOGGERS:
                logger.removeFilter(_without_traceback)
    finally:
        sys.unraisablehook, threading.excepthook = hooks
    return result


def _ignore(_: object) -> None:
    """Ignore an error instead of printing it."""


def _without_traceback(record: logging.LogRecord) -> bool:
    of_a_library = any(f"{os.sep}{name}{os.sep}" in record.pathname for name in _LIBRARIES)
    return not (record.exc_info and of_a_library)


def reason(error: Exception) -> str:
    """Return an error in one line; of a known machine error only the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in _OF_THE_MACHINE:
        if known.lower() in text.lower():
            return known
    return text[:200]
