"""What make would run, without running it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = (
    "setup",
    *(f".venv/installed{extra}" for extra in ("", "-harness", "-sky", "-samples")),
)
STUB = f"""#!{sys.executable}
import json, sys
if sys.argv[2] == "nrgpt_jax.from_make":
    sys.executable, sys.argv = sys.argv[0], sys.argv[2:]
    sys.path.insert(0, {str(ROOT)!r})
    from nrgpt_jax import from_make
    from_make.main()
print(json.dumps(sys.argv[2:]))
"""


def without_make() -> dict[str, str]:
    """The environment without what make has told the test about itself, as `make test` does."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    names = re.search(r"^GIVEN := (.*)$", makefile, re.MULTILINE)
    assert names
    told = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "CONFIG", *names[1].split()}
    return {name: value for name, value in os.environ.items() if name not in told}


def calls_of_make(
    command: str, folder: Path, **environment: str
) -> tuple[list[list[str]], subprocess.CompletedProcess]:
    """(programs with their arguments, the end of make) of a line of a shell that calls make.

    Args:
      command: `make ...`, of a goal that has its programs run by `nrgpt_jax.from_make`.
      folder: for a Python that says with which arguments it was called.
      environment: more variables.
    """
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    ready = " ".join(f"--old-file={name}" for name in INSTALLED)
    whole = command.replace("make", f"make --silent {ready} BIN={folder}", 1)
    done = subprocess.run(
        ["/bin/sh", "-c", whole],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**without_make(), **environment},
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done
