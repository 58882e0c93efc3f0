"""Attempts in this process and their outcomes: values, one line of error, or a failure."""

import contextlib
import io
import logging
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import hypothesis
from hypothesis.strategies import SearchStrategy

from nrgpt_jax.errors import UserError
from studies.reliability.judge import SHORT

GOOD = ("fine", "one line", "warning", "older, with a warning")
BAD = ("traceback", "hang", "silent")
SECONDS = 30  # time limit of a case, after which it counts as hung


class TooLong(BaseException):
    """Raised by a timeout; a BaseException, so that `except Exception` does not catch it."""


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """Capture warnings from `warnings`, absl's logger and stderr instead of printing them."""
    said, logger = io.StringIO(), logging.getLogger("absl")
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    held = mock.patch.multiple(logger, handlers=[handler], propagate=False)
    with held, contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("always")
        yield said


def judged(attempt: Callable[[], str]) -> tuple[str, str]:
    """Return (outcome, message) of `attempt`, which returns an outcome or raises.

    The expected failure is a UserError of one line.
    """

    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return attempt(), ""
    except UserError as error:
        outcome = "one line" if len(str(error).splitlines()) == 1 else "traceback"
        return outcome, str(error)
    except TooLong:
        return "hang", ""
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


Outcome = tuple[str, object, str, str]  # row name, case, outcome, message


def counted(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Return the figures of a part of the study: counts by row, and the failures."""
    rows: dict[str, dict[str, int]] = {}
    wrong = []
    for name, case, outcome, said in outcomes:
        rows.setdefault(name, dict.fromkeys((*GOOD, *BAD), 0))[outcome] += 1
        if outcome in BAD:
            wrong.append(f"{outcome}: {name}: {case!s:.{SHORT}}: {said[:SHORT]}")
    return {"rows": dict(sorted(rows.items())), "wrong": wrong}


def drawn(
    strategy: SearchStrategy, judge: Callable[[Any], tuple[str, str]], cases: int, seed: int
) -> list[Outcome]:
    """Judge cases drawn from a strategy; the first field of a case is the name of its row."""
    outcomes: list[Outcome] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def every(case):
        outcomes.append((case[0], case, *judge(case)))

    every()
    return outcomes
