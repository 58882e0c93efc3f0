"""Google Kubernetes Engine: a JobSet of one process a node, on a TPU slice or on nodes with GPUs.

On a TPU slice the processes find each other by what GKE tells their containers; with GPUs the
manifest names the first of them.
"""

import math
import re
import shlex
from typing import Any, NamedTuple

import yaml

from nrgpt_jax.errors import MISTAKE, UserError, require
from nrgpt_jax.launching.plan import GRACE, RECORDS, RESTARTS, Job, Plan

SHARED = "/shared"  # where the claim is mounted
_PORT = 8476
_WORKERS = "train"  # the name of the only job of the set, and of its container
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_NUMBER = {"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}}


class Cluster(NamedTuple):
    """Which nodes, which image, and what its containers may use."""

    image: str
    accelerator: str  # of the nodes, as GKE labels them: tpu-v5-lite-podslice, nvidia-h100-80gb
    topology: str  # of a TPU slice: 16x16; "": nodes with GPUs
    chips: int  # of a TPU node
    nodes: int  # with GPUs
    gpus: int  # of a node
    claim: str  # a persistent volume claim, mounted at /shared; "": none
    service_account: str  # "": the default one
    namespace: str


def plan(job: Job, action: str, where: Cluster, workdir: str) -> Plan:
    """Applies a manifest, after what is left of a job that has ended, or another action.

    Raises:
      UserError: the nodes or the image are not named, or the run directory would be lost.
    """
    kubectl = ["kubectl", f"--namespace={where.namespace}"]
    if action == "stop":
        return Plan([[*kubectl, *_delete(job)]])
    if action == "status":
        wide = ["--output=wide", f"--selector={pods_of(job)}"]
        return Plan([[*kubectl, "get", "jobset", job.name], [*kubectl, "get", "pods", *wide]])
    if action == "logs":
        return Plan(
            [[*kubectl, "logs", "--follow", "--tail=100", f"--selector={first_pod_of(job)}"]]
        )
    _check_workdir(workdir, where.claim)
    path = f"{RECORDS}/{job.name}.yaml"
    content = yaml.safe_dump(manifest(job, where), sort_keys=False)
    clear = ["bash", "-c", _clear(job, kubectl)]
    apply = [*kubectl, "apply", f"--filename={path}"]
    return Plan([clear, apply], {path: content}, _num_devices(where))


def pods_of(job: Job) -> str:
    """The selector of all pods of a JobSet."""
    return f"jobset.sigs.k8s.io/jobset-name={job.name}"


def first_pod_of(job: Job) -> str:
    """The selector of the pod that speaks."""
    return f"{pods_of(job)},batch.kubernetes.io/job-completion-index=0"


def _num_devices(where: Cluster) -> int | None:
    if not where.topology:
        return where.nodes * where.gpus
    one_a_chip = where.accelerator.startswith(("tpu-v4", "tpu-v5", "tpu-v6"))
    return _chips(where.topology) if one_a_chip else None


def _delete(job: Job) -> list[str]:
    # in the foreground: its pods have ended, and saved, when this returns
    return ["delete", "jobset", job.name, "--cascade=foreground"]


def _clear(job: Job, kubectl: list[str]) -> str:
    """A script: a JobSet cannot be changed, and one that has ended does not start again."""
    state = ["get", "jobset", job.name, "--ignore-not-found"]
    state += ["--output=jsonpath={.status.terminalState}"]
    return (
        f"state=$({shlex.join([*kubectl, *state])}) || exit\n"
        f'if [ -n "$state" ]; then {shlex.join([*kubectl, *_delete(job)])}; fi'
    )


def _check_workdir(workdir: str, claim: str) -> None:
    if not claim or not workdir.startswith(f"{SHARED}/"):
        raise UserError(
            f"--workdir={workdir} would be lost with its container; use {SHARED}/... with "
            "--claim=NAME of a volume that all nodes can write"
        )


def manifest(job: Job, where: Cluster) -> dict[str, Any]:
    """The JobSet: all pods restart when one fails, but not after a mistake of the user."""
    if not where.image or not where.accelerator:
        raise UserError("GKE needs --image=... and --accelerator=...; docs/launch.md has examples")
    if where.accelerator.startswith("tpu") and not where.topology:
        raise UserError(
            f"--accelerator={where.accelerator} is of TPUs: give --topology=16x16 or another"
        )
    nodes = _tpu_nodes(where) if where.topology else where.nodes
    require(nodes > 0, "--nodes", nodes, "at least 1, or give --topology of a TPU slice")
    mistakes = {"containerName": _WORKERS, "operator": "In", "values": [MISTAKE]}
    pods = {
        "completionMode": "Indexed",
        "parallelism": nodes,
        "completions": nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistakes}]},
        "template": {"spec": _pod(job, where, nodes)},
    }
    give_up = {
        "name": "mistake",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    one_slice = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "annotations": one_slice if where.topology else {}},
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS, "rules": [give_up]},
            "replicatedJobs": [{"name": _WORKERS, "replicas": 1, "template": {"spec": pods}}],
        },
    }


def _tpu_nodes(where: Cluster) -> int:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", where.topology):
        raise UserError(f"--topology={where.topology!r} is none, such as 4x4 or 4x4x8")
    chips = _chips(where.topology)
    require(
        where.chips > 0 and chips % where.chips == 0,
        "--chips",
        where.chips,
        f"the {chips} chips of {where.topology} must be whole nodes",
    )
    return chips // where.chips


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _pod(job: Job, where: Cluster, nodes: int) -> dict[str, Any]:
    on_tpu = bool(where.topology)
    device = "google.com/tpu" if on_tpu else "nvidia.com/gpu"
    join = [] if on_tpu else _join(job, nodes)
    container: dict[str, Any] = {
        "name": _WORKERS,
        "image": where.image,
        "command": [*map(_literal, job.command("python")), *join],
        "env": [*_extra_env(job), *([] if on_tpu else [_NUMBER])],
        "resources": {"limits": {device: where.chips if on_tpu else where.gpus}},
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],  # 64 MB without
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": _selector(where),
        "tolerations": [{"key": device, "operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    }
    if where.service_account:
        pod["serviceAccountName"] = where.service_account
    if where.claim:
        container["volumeMounts"].append({"name": "shared", "mountPath": SHARED})
        claim = {"claimName": where.claim}
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": claim})
    return pod


def _selector(where: Cluster) -> dict[str, str]:
    if not where.topology:
        return {"cloud.google.com/gke-accelerator": where.accelerator}
    return {
        "cloud.google.com/gke-tpu-accelerator": where.accelerator,
        "cloud.google.com/gke-tpu-topology": where.topology,
    }


def _join(job: Job, nodes: int) -> list[str]:
    first = f"{job.name}-{_WORKERS}-0-0.{job.name}:{_PORT}"
    complete = [f"--coordinator_address={first}", f"--num_processes={nodes}"]
    return [*complete, "--process_id=$(PROCESS_ID)"]


def _extra_env(job: Job) -> list[dict[str, str]]:
    return [{"name": name, "value": _literal(v)} for name, v in job.environment.items()]


def _literal(word: str) -> str:
    """Kubernetes puts a variable where a word says $(NAME); what a user wrote stays."""
    return word.replace("$", "$$")
