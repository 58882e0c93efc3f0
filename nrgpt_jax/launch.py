r"""Launch a training by SkyPilot: on a TPU slice, cloud GPUs, Kubernetes or SLURM.

    python -m nrgpt_jax.launch --target=tpu --config=experiments/NAME.py \
        --workdir=gs://BUCKET/runs/NAME [--bucket=gs://BUCKET] [--config.field=value ...]

A target is a SkyPilot task file: `launch/TARGET.yaml` in the current folder or this package, or the
path of another file. The configuration is checked locally; then `sky jobs launch` is called, or
`sky launch` for a task without job recovery. `--dry_run` prints the task and starts nothing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from absl import flags
from ml_collections import config_flags

from nrgpt_jax import bundled, cli
from nrgpt_jax.credentials import check_no_credentials
from nrgpt_jax.errors import UserError


def load_task(path: Path) -> dict[str, Any]:
    """Load a task file. Raises UserError if the file does not exist or is no task file."""
    try:
        task = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        task = None
    kinds = {"run": str, "envs": dict, "resources": dict, "num_nodes": int}
    usual = {"run": "", "envs": {}, "resources": {}, "num_nodes": 1}
    task = {**usual, **task} if isinstance(task, dict) and "run" in task else {}
    if not all(isinstance(task.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"--target: {path} is no task file; there are {', '.join(bundled.tasks())}")
    return task


def num_devices(task: Mapping[str, Any]) -> int | None:
    """Return the number of devices of a task; None if its accelerators do not determine it."""
    name = str(task["resources"].get("accelerators"))
    found = re.fullmatch(r"(?:tpu-(?:v5litepod|v6e)-|(?!tpu)[\w-]+:)(\d+)", name)
    return int(found[1]) * task["num_nodes"] if found else None  # v5p counts cores, not devices


def variables_of(f: flags.FlagValues, words: Sequence[str]) -> dict[str, str]:
    """Return the variables of the task. Raises UserError for files missing or lost remotely."""
    path, colon, variant = config_flags.get_config_filename(f["config"]).partition(":")
    if Path(path).resolve().parent == bundled.EXPERIMENTS.resolve():
        path = Path(path).stem
    elif Path.cwd().resolve() not in Path(path).resolve().parents:
        raise UserError(f"--config={path} is not in this folder, which is what is copied")
    else:
        path = str(Path(path).resolve().relative_to(Path.cwd().resolve()))
    workdir, bucket = f.workdir, f.bucket.rstrip("/")
    if not re.match(r"/|\w+://", workdir):
        if not workdir or not bucket:
            raise UserError(
                f"--workdir={workdir} is lost with the machine; give gs://BUCKET/..., or "
                "a folder that all of them mount, or --bucket=gs://BUCKET besides"
            )
        workdir = f"{bucket}/{workdir}"
    settings = ["--" + w.lstrip("-") for w in words if re.match("-*(no)?config[.]", w)]
    for word in settings:
        if "=" not in word:
            name = word.lstrip("-").removeprefix("no")
            raise UserError(f"{word} has no value; write it as --{name}=...")
    given = {"EXP": path + colon + variant, "WORKDIR": workdir, "ARGS": shlex.join(settings)}
    given |= {"BUCKET": bucket} if bucket else {}
    given |= {} if Path("setup.py").is_file() else {"PACKAGE": "nrgpt-jax"}
    for name, equals, value in (pair.partition("=") for pair in f.env):
        if not equals or not name.isidentifier():
            raise UserError(f"--env={name + equals + value!r} is not possible: NAME=VALUE")
        given[name] = value
    return given


def filled(text: str, variables: Mapping[str, str]) -> str:
    """Return the text of a task file with its variables set to these values."""
    for name, value in variables.items():
        quoted = yaml.safe_dump(value, default_style='"', width=sys.maxsize).strip()
        line = f"  {name}: {quoted}".replace("\\", r"\\")
        text, found = re.subn(rf"(?m)^  {name}:.*$", line, text)
        if not found:
            text = re.sub(r"(?m)^envs:.*$", rf"\g<0>\n{line}", text)
    return text


def main(f: flags.FlagValues) -> None:
    """Check the configuration, then print or start the task."""
    check_no_credentials(f.config)
    path = bundled.task(f.target)
    task, variables = load_task(path), variables_of(f, cli.arguments[1:])
    for name, value in {**task["envs"], **variables}.items():
        if value is None:
            raise UserError(f"{path} needs {name}; give --{name.lower()}=... (docs/launch.md)")
    if devices := num_devices(task):
        from nrgpt_jax.training.config_checks import check_config  # imports JAX: takes a second

        config = f.config.copy_and_resolve_references()
        config.wandb = False  # wandb is needed on the remote machine only
        check_config(config, devices)
    name = re.sub(r"[^a-z0-9]+", "-", f"nrgpt-{Path(f.workdir).name}".lower()).strip("-")
    managed = "job_recovery" in task["resources"]
    kind = ["jobs", "launch", f"--name={name}"] if managed else ["launch", f"--cluster={name}"]
    given = [f"--env={name}={value}" for name, value in variables.items()]
    command = ["sky", *kind, *f.sky, *given, str(path)]
    if f.dry_run:
        print(f"# {shlex.join(command)}\n{filled(path.read_text(), variables)}", end="")
        return
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("sky", path=here)
    if program is None:
        raise UserError("this needs SkyPilot: pip install 'nrgpt-jax[sky]'; --dry_run does not")
    sys.exit(subprocess.run([program, *command[1:]], check=False).returncode)


if __name__ == "__main__":
    cli.define_config_flag()
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("workdir", None, "Run directory, as the machines see it.", required=True)
    about = "tpu, gpu, multi_gpu, slurm, or the path of a task file."
    flags.DEFINE_string("target", None, about, required=True)
    flags.DEFINE_string("bucket", "", "Prepared data, and a relative --workdir, are in it.")
    flags.DEFINE_multi_string("env", [], "NAME=VALUE, a variable of the task.")
    flags.DEFINE_multi_string("sky", [], "A further word for sky: --yes, --infra=gcp/us-west4, ...")
    flags.DEFINE_boolean("dry_run", False, "Print the task; start nothing.")
    cli.run(lambda: main(flags.FLAGS))
