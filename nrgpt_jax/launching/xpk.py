"""GKE by XPK, Google's tool for TPU clusters: it writes the manifest and queues the workload."""

import re
import shlex
from typing import NamedTuple

from nrgpt_jax.errors import UserError
from nrgpt_jax.launching.gke import first_pod_of
from nrgpt_jax.launching.plan import GRACE, RESTARTS, Job, Plan


class Cluster(NamedTuple):
    """Which cluster of XPK, which TPUs of it, which image."""

    cluster: str
    zone: str
    project: str  # "": the one gcloud is set to
    tpu_type: str  # v5litepod-256
    image: str


def plan(job: Job, action: str, where: Cluster, workdir: str) -> Plan:
    """Creates a workload, or another action.

    Raises:
      UserError: the cluster, its TPUs or the image are not named, or the run would be lost.
    """
    if not where.cluster or not where.zone:
        raise UserError("XPK needs --cluster=NAME and --zone=ZONE")
    project = [f"--project={where.project}"] if where.project else []
    at = [f"--cluster={where.cluster}", f"--zone={where.zone}", *project]
    if action == "stop":
        return Plan([["xpk", "workload", "delete", f"--workload={job.name}", *at]])
    if action == "status":
        return Plan([["xpk", "workload", "list", f"--filter-by-job={job.name}", *at]])
    if action == "logs":
        pod = f"--selector={first_pod_of(job)}"
        return Plan([["kubectl", "logs", "--follow", "--tail=100", pod]])
    if not where.tpu_type or not where.image:
        raise UserError("XPK needs --tpu_type=v5litepod-256 or another, and --image=...")
    if not workdir.startswith("/"):
        raise UserError(
            f"--workdir={workdir} would be lost with its container; use a folder of a volume that "
            "is attached to the cluster"
        )
    return Plan(
        [
            [
                *("xpk", "workload", "create", f"--workload={job.name}", *at),
                f"--tpu-type={where.tpu_type}",
                f"--docker-image={where.image}",
                f"--max-restarts={RESTARTS}",
                "--restart-on-exit-codes=1",  # a crash; besides those of signals
                f"--termination-grace-period-seconds={GRACE}",
                *(f"--env={name}={value}" for name, value in job.environment.items()),
                # exec: the signal that XPK sends reaches the program itself
                f"--command=exec {shlex.join(job.command('python'))}",
            ]
        ],
        num_devices=_num_devices(where.tpu_type),
    )


def _num_devices(tpu_type: str) -> int | None:
    # these are named by their chips, others by their cores
    chips = re.fullmatch(r"(?:v5litepod|v6e)-(\d+)", tpu_type)
    return int(chips[1]) if chips else None
