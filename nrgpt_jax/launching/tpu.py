"""A Cloud TPU VM or a slice of several: the same commands on all workers, by gcloud.

The processes find each other by what a TPU VM knows of its slice.
"""

import subprocess
from typing import NamedTuple

from nrgpt_jax.errors import UserError
from nrgpt_jax.launching.background import background, refuse_if_running
from nrgpt_jax.launching.plan import RECORDS, Job, Plan

HOME = '"$HOME/nrgpt"'  # the copy of the repository on a worker


class Slice(NamedTuple):
    """Which TPU, and which code."""

    tpu: str
    zone: str
    project: str  # "": the one gcloud is set to
    commit: str


def plan(job: Job, action: str, where: Slice) -> Plan:
    """Copies and installs a commit on all workers and starts it there, or another action.

    Raises:
      UserError: the TPU or its zone is not named, or there is no such commit.
    """
    if not where.tpu or not where.zone:
        raise UserError("a TPU needs its name and zone: make launch TPU=name ZONE=zone EXP=...")
    script = background(job, action, HOME, ".venv/bin/python")
    if action != "start":
        worker = "all" if action == "stop" else "0"
        return Plan([_ssh(where, worker, script)])
    archive = f"{RECORDS}/{job.name}.tar.gz"
    pack = ["git", "archive", "--format=tar.gz", f"--output={archive}", _resolved(where.commit)]
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{where.tpu}:nrgpt.tar.gz"]
    return Plan(
        [
            ["mkdir", "-p", RECORDS],
            pack,
            [*copy, *_flags(where, "all")],
            _ssh(where, "all", _install(job)),
            _ssh(where, "all", script),
        ]
    )


def _ssh(where: Slice, worker: str, script: str) -> list[str]:
    head = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", where.tpu]
    return [*head, *_flags(where, worker), f"--command={script}"]


def _flags(where: Slice, worker: str) -> list[str]:
    project = [f"--project={where.project}"] if where.project else []
    return [f"--zone={where.zone}", *project, f"--worker={worker}"]


def _install(job: Job) -> str:
    # uv brings a Python where that of the image is too old; runs/ and .venv/ are kept.
    return "\n".join(
        [
            "set -eu",
            f"mkdir -p {HOME}",
            f"cd {HOME}",
            refuse_if_running(job),
            "rm -rf nrgpt_jax experiments",
            'tar -xzf "$HOME/nrgpt.tar.gz"',
            "test -x .uv/bin/uv || python3 -m pip install --quiet --target=.uv uv",
            "test -x .venv/bin/python || .uv/bin/uv venv --quiet --python 3.11 .venv",
            ".uv/bin/uv pip install --quiet --python .venv/bin/python "
            "--constraint constraints.txt --editable '.[tpu,hf]'",
        ]
    )


def _resolved(commit: str) -> str:
    wanted = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    try:
        done = subprocess.run(wanted, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git is not installed here; it packs the code for the workers") from None
    if done.returncode:
        raise UserError(f"--commit={commit!r} is no commit of this repository")
    return done.stdout.strip()
