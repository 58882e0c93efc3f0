"""Signals are answered at once wherever they come, and what was done is saved."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow

from nrgpt_jax.training.stop import Stop

ROOT = Path(__file__).resolve().parents[1]

# A program whose main thread is in a function of C that no signal ends, as in a compilation.
BUSY = """
import hashlib, sys
from nrgpt_jax.training.stop import Stop
with Stop() as stop:
    {begin}
    with stop.rescuing(lambda: print("saved", flush=True)):
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
print("went on")
"""


def _stopped(code: str, number: int) -> subprocess.CompletedProcess[str]:
    """The end of a program that is sent a signal when it says that it is ready."""
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(number)
        out, err = program.communicate()
    return subprocess.CompletedProcess(command, program.returncode, out, err)


@pytest.mark.ci
@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "begun"),
    [
        (signal.SIGTERM, True),
        (signal.SIGINT, False),
        slow(signal.SIGINT, True),
        slow(signal.SIGTERM, False),
    ],
)
def test_a_busy_main_thread_is_no_reason_to_wait(number, begun):
    done = _stopped(BUSY.format(begin="stop.begin()" if begun else ""), number)
    assert done.returncode == 128 + number
    assert done.stdout == ("saved\n" if begun else "")
    assert ("stopped and saved" if begun else "nothing is lost") in done.stderr


@pytest.mark.slow
def test_what_cannot_be_saved_meanwhile_is_a_failure():
    code = BUSY.replace('print("saved", flush=True)', "open('/nowhere/file')")
    done = _stopped(code.format(begin="stop.begin()"), signal.SIGTERM)
    assert done.returncode == 1
    assert "error: stopped, and the last steps are not saved: [Errno 2]" in done.stderr


def test_the_first_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.begin()
        assert not stop.asked()
        seen = []
        for number in stop.cuts_short(range(5)):
            seen.append(number)
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
        assert seen == [0, 1], "nothing after the one in which it came"
        assert stop.asked()
        assert stop.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a second one ends the process"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_main_thread_that_answers_is_left_to_save():
    saved: list[str] = []
    with Stop() as stop:
        stop.begin()
        with stop.rescuing(lambda: saved.append("by the other thread")):
            signal.raise_signal(signal.SIGINT)
        assert stop.happened
    assert saved == []
