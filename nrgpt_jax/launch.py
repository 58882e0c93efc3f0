"""Starts training elsewhere: on a TPU slice, a SLURM cluster, GKE, or in the background here.

    python -m nrgpt_jax.launch --target=tpu --tpu=NAME --zone=ZONE \\
        --config=experiments/NAME.py --workdir=/mnt/shared/RUN [--config.field=value ...]
    python -m nrgpt_jax.launch --target=slurm --nodes=2 --gpus=8 [--sbatch=--partition=gpu] ...
    python -m nrgpt_jax.launch --target=gke --image=IMAGE --accelerator=tpu-v5-lite-podslice \\
        --topology=16x16 ...
    python -m nrgpt_jax.launch --target=local ...

`--dry_run` prints the commands as a shell script and starts nothing. `--action=logs`, `stop` and
`status` look after what was started. The same command again resumes from the last checkpoint.
docs/launch.md leads through each target.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli
from nrgpt_jax.credentials import check_no_credentials
from nrgpt_jax.errors import UserError
from nrgpt_jax.launching import gke, local, slurm, tpu, xpk
from nrgpt_jax.launching.plan import ACTIONS, Job, Plan, carry_out, checked_name, job_name, script


def job(f: flags.FlagValues, argv: Sequence[str]) -> Job:
    """The call of the training program that the flags describe."""
    overrides = [word for word in argv if word.lstrip("-").startswith("config")]
    for word in overrides:
        if "=" not in word:
            raise UserError(f"{word} has no value; write it as {word}=...")
    arguments = tuple("--" + word.lstrip("-") for word in overrides)
    environment = dict(_setting(pair) for pair in f.env)
    name = job_name(f.workdir) if f.name is None else checked_name(f.name)
    return Job(name, (*arguments, f"--workdir={f.workdir}"), environment)


def _setting(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--env={pair!r} is not possible: NAME=VALUE")
    return name, value


def _tpu(f: flags.FlagValues, job: Job) -> Plan:
    if f.action == "start":
        _note_changes(f.commit)
    if "://" not in f.workdir and not f.workdir.startswith("/"):
        _print_note(f"note: {f.workdir} is a folder of each worker; several need one they share")
    return tpu.plan(job, f.action, tpu.Slice(f.tpu, f.zone, f.project, f.commit))


def _slurm(f: flags.FlagValues, job: Job) -> Plan:
    return slurm.plan(job, f.action, slurm.Nodes(f.nodes, f.gpus, f.cpus, f.time, f.sbatch))


def _gke(f: flags.FlagValues, job: Job) -> Plan:
    where = gke.Cluster(
        image=f.image,
        accelerator=f.accelerator,
        topology=f.topology,
        chips=f.chips,
        nodes=f.nodes,
        gpus=f.gpus,
        claim=f.claim,
        service_account=f.service_account,
        namespace=f.namespace,
    )
    return gke.plan(job, f.action, where, f.workdir)


def _xpk(f: flags.FlagValues, job: Job) -> Plan:
    where = xpk.Cluster(f.cluster, f.zone, f.project, f.tpu_type, f.image)
    return xpk.plan(job, f.action, where, f.workdir)


TARGETS: dict[str, Callable[[flags.FlagValues, Job], Plan]] = {
    "tpu": _tpu,
    "slurm": _slurm,
    "gke": _gke,
    "xpk": _xpk,
    "local": lambda f, job: local.plan(job, f.action),
}


def _note_changes(commit: str) -> None:
    changed = ["git", "status", "--porcelain", "--untracked-files=no"]
    done = subprocess.run(changed, capture_output=True, text=True, check=False)
    if done.stdout:
        _print_note(
            f"note: the workers get commit {commit}, without the changes that are not committed"
        )


def _print_note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _check(config: ConfigDict, num_devices: int) -> None:
    """Refuses a configuration that those devices cannot train, before they are asked for."""
    from nrgpt_jax.training.config_checks import check_config  # brings JAX, which takes a second

    config = config.copy_and_resolve_references()
    config.wandb = False  # it is not here that wandb must be installed
    check_config(config, num_devices)


def main(f: flags.FlagValues) -> None:
    """Shows the plan or carries it out."""
    check_no_credentials(f.config)
    plan = TARGETS[f.target](f, job(f, cli.arguments[1:]))
    if plan.num_devices is not None:
        _check(f.config, plan.num_devices)
    if f.dry_run:
        print(script(plan), end="")
    else:
        carry_out(plan)


def _define_flags() -> None:
    cli.define_config_flag()
    cli.define_workdir_flag()
    flags.mark_flag_as_required("config")
    flags.DEFINE_enum("target", "local", tuple(TARGETS), "Where to train.")
    flags.DEFINE_enum("action", "start", ACTIONS, "What to do there.")
    flags.DEFINE_boolean("dry_run", False, "Print the commands, as a script; start nothing.")
    flags.DEFINE_string("name", None, "Of the job; by default the last folder of --workdir.")
    flags.DEFINE_multi_string("env", [], "NAME=VALUE in the environment of the program.")
    flags.DEFINE_string("tpu", "", "tpu: name of the TPU VM or slice.")
    flags.DEFINE_string("commit", "HEAD", "tpu: which commit of this repository to run.")
    flags.DEFINE_string("zone", "", "tpu, xpk: its zone.")
    flags.DEFINE_string("project", "", "tpu, xpk: its project; by default that of gcloud.")
    flags.DEFINE_integer("nodes", 1, "slurm, gke with GPUs: number of nodes.")
    flags.DEFINE_integer("gpus", 8, "slurm, gke: GPUs of a node.")
    flags.DEFINE_integer("cpus", 0, "slurm: cores of a node; 0: four a GPU.")
    flags.DEFINE_string("time", "24:00:00", "slurm: time limit; the job resumes in another one.")
    flags.DEFINE_multi_string("sbatch", [], "slurm: a further option, as --partition=gpu.")
    flags.DEFINE_string("image", "", "gke, xpk: the container image.")
    flags.DEFINE_string("accelerator", "", "gke: label of the nodes: tpu-v5-lite-podslice, ...")
    flags.DEFINE_string("topology", "", "gke: of a TPU slice: 16x16, 4x4x8; without: GPUs.")
    flags.DEFINE_integer("chips", 4, "gke: TPU chips of a node.")
    flags.DEFINE_string("claim", "", "gke: a volume claim to mount at /shared.")
    flags.DEFINE_string("service_account", "", "gke: of the pods, for access to buckets.")
    flags.DEFINE_string("namespace", "default", "gke: of the job.")
    flags.DEFINE_string("cluster", "", "xpk: name of the cluster.")
    flags.DEFINE_string("tpu_type", "", "xpk: v5litepod-256 or another.")


if __name__ == "__main__":
    _define_flags()
    cli.run(lambda: main(flags.FLAGS))
