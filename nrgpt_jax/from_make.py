"""Runs a program with what was given to make, as it was given: the Makefile's own tool.

    python -m nrgpt_jax.from_make nrgpt_jax.sample workdir=WORKDIR prompt=PROMPT

calls `python -m nrgpt_jax.sample --workdir=... --prompt=...` with the values of the variables
WORKDIR and PROMPT, where they are set, and with the arguments in ARGS. ARGS is split at blanks as a
shell does, quotes included, and nothing in it or in the values is expanded.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from nrgpt_jax.errors import MISTAKE


def value_of(name: str) -> str | None:
    """The value of a variable of make: as it was typed, where that can be seen."""
    typed = [word for word in _typed() if word.startswith(f"{name}=")]
    return typed[-1].partition("=")[2] if typed else os.environ.get(name)


def _typed() -> list[str]:
    """The arguments of make, which drops the blanks that a value begins with; [] if not known."""
    process = os.getppid()
    try:
        for _ in range(2):  # make, or a shell that it has started
            words = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
            if re.fullmatch(r"g?make", Path(words[0]).name):
                return words[1:]
            status = Path(f"/proc/{process}/stat").read_text()
            process = int(status.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # not Linux, or gone
        pass
    return []


def arguments(pairs: list[str]) -> list[str]:
    """The arguments of a program, for pairs `flag=VARIABLE`. Raises ValueError on open quotes."""
    result = []
    for flag, _, name in (pair.partition("=") for pair in pairs):
        value = value_of(name)
        if value or (value is not None and flag == "prompt"):  # an empty prompt is one
            result.append(f"--{flag}={value}")
    return [*result, *shlex.split(value_of("ARGS") or "")]


def main() -> None:
    """Becomes the program."""
    module, *pairs = sys.argv[1:]
    try:
        result = arguments(pairs)
    except ValueError as error:
        sys.stderr.write(f"error: ARGS cannot be split into arguments: {error}\n")
        sys.exit(MISTAKE)
    os.execv(sys.executable, [sys.executable, "-m", module, *result])


if __name__ == "__main__":
    main()
