"""How a case has ended, and how many have ended how."""

import collections
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from absl import logging
from hypothesis.strategies import SearchStrategy

from nrgpt_jax.errors import UserError
from studies.tables import table

GOOD = ("fine", "one line", "warning")
BAD = ("traceback", "hang", "silent")
SECONDS = 30  # a case that takes longer hangs


class TooLong(BaseException):
    """A case has taken too long; no program catches it by mistake."""


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooLong after so many seconds, in the main thread."""

    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def warnings_counted() -> Iterator[list[str]]:
    """The warnings that absl is given meanwhile, which it does not print."""
    seen: list[str] = []
    before = logging.warning
    logging.warning = lambda message, *values: seen.append(message % values if values else message)
    try:
        yield seen
    finally:
        logging.warning = before


def judged(attempt: Callable[[], str]) -> tuple[str, str]:
    """(outcome, what was said) of `attempt`, which returns an outcome or raises.

    A UserError of one line is the way to fail.
    """
    try:
        with time_limit():
            return attempt(), ""
    except UserError as error:
        outcome = "one line" if len(str(error).splitlines()) == 1 else "traceback"
        return outcome, str(error)
    except TooLong:
        return "hang", ""
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"


def tally(strategy: SearchStrategy, judge: Callable[[Any], tuple[str, str]], cases: int, seed: int):
    """Judges cases drawn from a strategy.

    Returns:
      Counts by outcome, `cases` of them all, and `wrong`: descriptions of the bad ones.
    """
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []

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
        outcome, said = judge(case)
        counts[outcome] += 1
        if outcome in BAD:
            wrong.append(f"{outcome}: {case}: {said[:500]}")

    every()
    found: dict[str, Any] = {"cases": sum(counts.values())}
    return {**found, **{name: counts[name] for name in (*GOOD, *BAD)}, "wrong": wrong}


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    return table(["cases", *GOOD, *BAD], [[found[name] for name in ("cases", *GOOD, *BAD)]])
