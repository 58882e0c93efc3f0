"""A folder to launch from, and programs on its PATH that only write down how they are called."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = 'it\'s "a" $HOME $(id) `id` \\; # x'  # a value that a shell would take apart
CONFIG = "--config=experiments/listops.py"
TPU = ("--target=tpu", "--tpu=my-tpu", "--zone=us-x1-a")
SLURM = ("--target=slurm", "--nodes=4", "--gpus=2", "--sbatch=--partition=gpu")
GKE = ("--target=gke", "--claim=nfs")
SPLIT = ("--config.mesh.tensor=8", "--config.optimizer.accumulation_steps=1")  # of 256 devices
V5E = ("--accelerator=tpu-v5-lite-podslice", "--topology=16x16")
GKE_TPU = (*GKE, "--image=r/i:1", *V5E, *SPLIT)
GKE_GPU = (*GKE, "--image=r/i:1", "--accelerator=nvidia-h100-80gb", "--nodes=2")
XPK_V5E = ("--cluster=c", "--zone=z", "--tpu_type=v5litepod-256", "--image=r/i:1")
XPK = ("--target=xpk", *XPK_V5E, *SPLIT)
FOLDER = "--workdir=/shared/runs/Big_1"
TRAIN = ["-m", "nrgpt_jax.train", CONFIG]
GCLOUD = ["gcloud", "compute", "tpus", "tpu-vm"]
VALUE = f"--config.experiment={HOSTILE}"


RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print(os.environ.get("FAKE_OUTPUT", ""))
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


def write_program(path: Path, source: str = RECORDER) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    path.chmod(0o755)


class Desk:
    """A repository with the experiments and one commit; what is called from there is recorded."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder / "desk", folder / "record"
        self.bin, self.home = folder / "bin", folder / "home"
        for path in (self.folder, self.bin, self.home):
            path.mkdir()
        (self.folder / "experiments").symlink_to(ROOT / "experiments")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "NRGPT_"))},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "RECORD": str(self.record),
        }
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        self.call("git", "init", "--quiet")
        self.call("git", "add", "--all")
        self.call("git", *author, "commit", "--quiet", "--message=one")
        self.commit = self.call("git", "rev-parse", "HEAD").stdout.strip()

    def has(self, *programs: str) -> None:
        """Puts recorders of these names on the PATH."""
        for name in programs:
            write_program(self.bin / name)

    def call(self, *argv: str, **more: str) -> subprocess.CompletedProcess:
        """Runs a program there, with more variables in its environment."""
        environment = {**self.environment, **more}
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def launch(self, *arguments: str) -> subprocess.CompletedProcess:
        """`python -m nrgpt_jax.launch` for the experiment of ListOps."""
        config = "--config=experiments/listops.py"
        return self.call(sys.executable, "-m", "nrgpt_jax.launch", config, *arguments)

    def calls(self) -> list[list[str]]:
        """What was called since the last time."""
        if not self.record.exists():
            return []
        lines = self.record.read_text().splitlines()
        self.record.unlink()
        return [json.loads(line) for line in lines]


def expanded(word: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command: $(NAME) is replaced, $$ is a dollar."""
    replace = lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0])
    return re.sub(r"\$\$|\$\((\w+)\)", replace, word)
