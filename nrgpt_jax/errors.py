"""Errors that the user can fix, as one line with the cause and the remedy; exit codes."""

import signal
from collections.abc import Iterable
from typing import Any

# Exit codes, by which launchers decide on a restart.
FAILED = 1  # a failure of the machine: a full disk, a folder that cannot be written
MISTAKE = 2  # a UserError


def stopped_by(number: int) -> int:
    """Return the exit code of a program stopped by a signal, as in shells: 130, 143."""
    return 128 + number


STOPPED = stopped_by(signal.SIGTERM)  # a training that stopped early and saved a checkpoint


class UserError(ValueError):
    """An error of the user: programs print one line without a traceback, and exit with code 2."""


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raise a UserError with field, value and allowed values unless the condition holds."""
    if not condition:
        raise UserError(f"{field}={value!r} is not possible: {allowed}")


def require_choice(field: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise a UserError unless the value is one of the allowed ones."""
    require(value in allowed, field, value, "choose one of " + ", ".join(allowed))
