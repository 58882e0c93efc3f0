"""What a launch consists of: a job, the files it needs, and the commands that start it.

A plan is data. It is shown as a shell script, or carried out; the two do the same.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nrgpt_jax.errors import UserError

RECORDS = "launched"  # folder of scripts, manifests, logs and process numbers
GRACE = 120  # seconds to save in, from SIGTERM to SIGKILL
RESTARTS = 100  # how often a cluster restarts a job by itself
ACTIONS = ("start", "stop", "logs", "status")
_END = "END_OF_FILE"


class Job(NamedTuple):
    """A call of the training program."""

    name: str  # letters, digits and hyphens, as Kubernetes wants it
    arguments: tuple[str, ...]  # --config=..., --workdir=..., --config.field=...
    environment: Mapping[str, str]

    def command(self, python: str) -> list[str]:
        """The call, with this Python."""
        return [python, "-m", "nrgpt_jax.train", *self.arguments]

    def shell(self, python: str) -> str:
        """The call as a line of a shell script, with its environment."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(["env", *settings] if settings else []), *self.command(python)])


class Plan(NamedTuple):
    """Files to write, then commands to run one after another."""

    commands: Sequence[Sequence[str]]
    files: Mapping[str, str] = {}  # content by path
    num_devices: int | None = None  # that a training so started has; None: not known


def job_name(workdir: str) -> str:
    """The name of the job that trains in a run directory: its last folder, as Kubernetes wants it.

    Raises:
      UserError: nothing is left of it.
    """
    last = workdir.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40].rstrip("-")
    name = re.sub(r"^[0-9-]+", "", name)
    if not name:
        raise UserError(f"--workdir={workdir} gives the job no name; give --name=...")
    return name


def checked_name(name: str) -> str:
    """The name, if Kubernetes takes it (and then SLURM and a file system do).

    Raises:
      UserError: it does not.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name={name!r} is not possible: at most 40 lower-case letters, digits and hyphens, "
            "the first a letter"
        )
    return name


def script(plan: Plan) -> str:
    """The plan as a shell script."""
    lines = []
    for path, content in plan.files.items():
        lines += [f"mkdir -p {shlex.quote(str(Path(path).parent))}"]
        lines += [f"cat > {shlex.quote(path)} <<'{_END}'", content.rstrip("\n"), _END]
    return "\n".join([*lines, *map(shlex.join, plan.commands)]) + "\n"


def carry_out(plan: Plan) -> None:
    """Writes the files and runs the commands.

    Raises:
      UserError: a program is not installed, or has failed.
    """
    for command in plan.commands:
        if shutil.which(command[0]) is None:
            raise UserError(
                f"{command[0]} is not installed here; --dry_run shows what would be called"
            )
    for path, content in plan.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content.rstrip("\n") + "\n")
    for command in plan.commands:
        code = subprocess.run(command, check=False).returncode
        if code:
            begin = " ".join(command).splitlines()[0][:60]
            raise UserError(f"{begin} ... has failed (exit code {code})")
