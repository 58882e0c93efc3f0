"""Run a program with the variables of make, unexpanded; used by the Makefile.

    python -m nrgpt_jax.from_make nrgpt_jax.sample workdir=WORKDIR prompt=PROMPT

calls `python -m nrgpt_jax.sample --workdir=... --prompt=...` with the values of the variables
WORKDIR and PROMPT, if set, and the arguments in ARGS. ARGS is split at blanks and quotes as in a
shell. Nothing in ARGS or in the values is expanded.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from nrgpt_jax.errors import MISTAKE


def value_of(name: str) -> str | None:
    """Return the value of a make variable: as typed, or else from the environment."""
    typed = [word for word in _typed() if word.startswith(f"{name}=")]
    return typed[-1].partition("=")[2] if typed else os.environ.get(name)


def _typed() -> list[str]:
    """Return the arguments of make, with the leading blanks that make drops; [] if unknown."""
    process = os.getppid()
    try:
        for _ in range(2):  # make, or a shell started by make
            words = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
            if re.fullmatch(r"g?make", Path(words[0]).name):
                return words[1:]
            status = Path(f"/proc/{process}/stat").read_text()
            process = int(status.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # not Linux, or the process has exited
        pass
    return []


def arguments(pairs: list[str]) -> list[str]:
    """Return program arguments for pairs `flag=VARIABLE`. Raises ValueError on open quotes."""
    result = []
    for flag, _, name in (pair.partition("=") for pair in pairs):
        value = value_of(name)
        if value or (value is not None and flag == "prompt"):  # a prompt may be empty
            result.append(f"--{flag}={value}")
    return [*result, *shlex.split(value_of("ARGS") or "")]


def main() -> None:
    """Replace this process by the program."""
    module, *pairs = sys.argv[1:]
    try:
        result = arguments(pairs)
    except ValueError as error:
        sys.stderr.write(f"error: ARGS cannot be split into arguments: {error}\n")
        sys.exit(MISTAKE)
    os.execv(sys.executable, [sys.executable, "-m", module, *result])


if __name__ == "__main__":
    main()
