"""How a program has ended, against what is documented."""

import signal
from typing import NamedTuple

from studies.programs import Done, Running
from studies.reliability.judge import SHORT

MISTAKE, MACHINE = {2}, {1}  # exit codes: of the user, and when the machine has failed
PATIENCE = 400.0  # seconds until a program that does not end is called hung
TRACEBACK = "Traceback (most recent call last)"


class Result(NamedTuple):
    """One thing that was tried, and what is wrong with how it ended."""

    what: str
    stage: str  # where it hit, in words
    wrong: list[str]


def end(running: Running, seconds: float = PATIENCE) -> Done:
    """Waits for the end of a program; one that hangs is killed, which its exit code tells."""
    try:
        return running.end(seconds)
    except TimeoutError:
        running.send(signal.SIGKILL)
        return running.end()


def as_a_shell_sees_it(done: Done) -> int:
    """The exit code; 128 + number of a process that a signal has ended."""
    code = done.returncode
    assert code is not None
    return 128 - code if code < 0 else code


def error_lines(done: Done) -> list[str]:
    """The lines that name an error."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def last_words(done: Done) -> str:
    """The end of what it has said."""
    return " | ".join(done.stderr.splitlines()[-3:])[-SHORT:]


def _raised(done: Done) -> str:
    """The error that ends the first traceback."""
    after = done.stderr.partition(TRACEBACK)[2].splitlines()[1:]
    return next((line for line in after if line[:1].strip()), "")[:SHORT]


def wrong(done: Done, codes: set[int]) -> list[str]:
    """What is wrong with an end: the exit code, a traceback, or not one line of error if there is
    to be an error."""
    told, code = [], as_a_shell_sees_it(done)
    if code not in codes:
        told.append(f"exit code {code}, not {sorted(codes)}: {last_words(done)}")
    if TRACEBACK in done.stderr:
        told.append(f"a traceback: {_raised(done)}")
    count = len(error_lines(done))
    if count != (code in (1, 2)):
        told.append(f"{count} lines of error: {last_words(done)}")
    return told
