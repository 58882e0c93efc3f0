"""Errors that are the user's to mend: one line that names the cause and the cure."""

import signal
from collections.abc import Iterable
from typing import Any

# Exit codes, by which launchers know what to start again.
FAILED = 1  # the machine did: a full disk, a folder that cannot be written
MISTAKE = 2  # a UserError


def stopped_by(number: int) -> int:
    """The exit code of a program that a signal has stopped, as shells have it: 130, 143."""
    return 128 + number


STOPPED = stopped_by(signal.SIGTERM)  # a training before its end, and it was saved


class UserError(ValueError):
    """Shown by the programs as one line, without a traceback; exit code 2."""


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raises a UserError that names field, value and what is allowed, unless it holds."""
    if not condition:
        raise UserError(f"{field}={value!r} is not possible: {allowed}")


def require_choice(field: str, value: Any, allowed: Iterable[str]) -> None:
    """The value must be one of the allowed ones."""
    require(value in allowed, field, value, "choose one of " + ", ".join(allowed))
