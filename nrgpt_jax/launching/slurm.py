"""A SLURM cluster: one task a node, which drives all GPUs of the node.

Two things are not as one would expect. JAX gives a process under SLURM one GPU, the one with the
number of its task on the node; JAX_LOCAL_DEVICE_IDS gives it all of them. And SLURM takes a program
that SIGTERM has stopped and that ends well for a finished one; the exit code says that it is not.
Where a cluster ends all tasks by SIGTERM when one has crashed, the exit code is the same; so a job
is queued again a limited number of times.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nrgpt_jax.errors import STOPPED, UserError, require
from nrgpt_jax.launching.plan import GRACE, RECORDS, RESTARTS, Job, Plan


class Nodes(NamedTuple):
    """What is asked of SLURM."""

    nodes: int
    gpus: int  # of a node
    cpus: int  # of a node; 0: four a GPU
    time: str  # limit, as SLURM writes it
    options: Sequence[str]  # further options of sbatch, such as --partition=gpu


def plan(job: Job, action: str, where: Nodes) -> Plan:
    """Submits a batch script, or another action.

    Raises:
      UserError: a number, the time limit or an option cannot be one of sbatch.
    """
    if action == "stop":
        return Plan([["scancel", "--me", f"--name={job.name}"]])
    if action == "status":
        return Plan([["squeue", "--me", f"--name={job.name}"]])
    if action == "logs":
        return Plan([["tail", "-n", "100", "-F", _log(job)]])
    path = f"{RECORDS}/{job.name}.sbatch"
    return Plan([["sbatch", path]], {path: _script(job, where)}, where.nodes * where.gpus)


def _log(job: Job) -> str:
    return f"{RECORDS}/{job.name}.log"


def _script(job: Job, where: Nodes) -> str:
    cpus = where.cpus or 4 * where.gpus
    devices = ",".join(map(str, range(where.gpus)))
    head = [f"#SBATCH {option}" for option in _options(job, where, cpus)]
    call = shlex.join(["srun", f"--cpus-per-task={cpus}", *job.command(sys.executable)])
    settings = [f"export {name}={shlex.quote(v)}" for name, v in job.environment.items()]
    return "\n".join(
        [
            "#!/bin/bash",
            *head,
            "",
            f"export JAX_LOCAL_DEVICE_IDS={devices} # all GPUs of the node, not one a task",
            *settings,
            "",
            call,
            "code=$?",
            f"if [ $code = {STOPPED} ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {RESTARTS} ]; then",
            '    scontrol requeue "$SLURM_JOB_ID" # stopped and saved before its end: resume later',
            "fi",
            "exit $code",
        ]
    )


def _options(job: Job, where: Nodes, cpus: int) -> list[str]:
    require(where.nodes > 0, "--nodes", where.nodes, "at least 1")
    require(where.gpus > 0, "--gpus", where.gpus, "at least 1; how many GPUs has a node?")
    if not re.fullmatch(r"[\d:-]+", where.time):
        raise UserError(f"--time={where.time!r} is no time limit, such as 24:00:00 or 2-12:00:00")
    for option in where.options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"--sbatch={option!r} is no option of sbatch, such as --partition=gpu")
    return [
        f"--job-name={job.name}",
        "--dependency=singleton",  # started twice, it waits: one job of a name at a time
        f"--nodes={where.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={where.gpus}",
        f"--cpus-per-task={cpus}",
        f"--time={where.time}",
        f"--chdir={_quoted(str(Path.cwd()))}",
        f"--output={_log(job)}",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{GRACE}",
        *map(_option, where.options),
    ]


def _option(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}{equals}{_quoted(value)}"


def _quoted(value: str) -> str:
    """As #SBATCH lines want it: quoted where it holds what would end it."""
    if not re.search(r"[\s#'\"\\]", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
