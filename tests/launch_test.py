"""Launching: what SkyPilot is called with, and what task files and scripts run on the machines.

No cloud is reached: sky, gcloud, srun, uv and nrgpt are programs that record how they are called.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages_helpers import mistake

from nrgpt_jax.bundled import TASKS, tasks
from nrgpt_jax.launch import filled

pytestmark = pytest.mark.ci

ROOT = TASKS.parent
HOSTILE = 'it\'s "a" $HOME $(id) `id` \\; # x: y'  # a value that a shell or YAML would take apart
VALUE = f"--config.experiment={HOSTILE}"
SPLIT = ("--config.mesh.tensor=8", "--config.optimizer.accumulation_steps=1")  # of 256 devices
TPU = ("--target=tpu", "--bucket=gs://b", *SPLIT)
NAMES = ("JAX_LOCAL_DEVICE_IDS", "NRGPT_CACHE_DIR")
RECORDER = f"""#!{sys.executable}
import json, os, sys
seen = {{name: os.environ[name] for name in {NAMES} if name in os.environ}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], seen]) + "\\n")
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


class Desk:
    """A folder with experiments; what is called from there is recorded."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.record = folder, folder / "bin", folder / "record"
        (folder / "experiments").symlink_to(ROOT / "experiments")
        (folder / "setup.py").touch()
        for name in ("sky", "srun", "scontrol", "uv", "gcloud"):
            self.has(self.bin / name)
        path = f"{self.bin}:{os.environ['PATH']}"
        more = {"PATH": path, "PYTHONPATH": str(ROOT), "RECORD": str(self.record)}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("NRGPT_")}
        self.environment = {**clean, **more}

    def has(self, path: Path) -> None:
        """Puts a recorder there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORDER)
        path.chmod(0o755)

    def call(self, *argv: str, **more: str) -> subprocess.CompletedProcess:
        """Runs a program there, with more variables in its environment."""
        given = {**self.environment, **more}
        return subprocess.run(argv, env=given, cwd=self.folder, capture_output=True, text=True)

    def launch(self, *arguments: str) -> subprocess.CompletedProcess:
        """`nrgpt launch listops` with these arguments."""
        return self.call(sys.executable, "-m", "nrgpt_jax", "launch", "listops", *arguments)

    def calls(self) -> list:
        """(program, arguments, variables of NAMES) of what was called since the last time."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("target", "head"),
    [("tpu", ["jobs", "launch", "--name=nrgpt-a-b"]), ("slurm", ["launch", "--cluster=nrgpt-a-b"])],
)
def test_what_is_shown_is_what_is_called(desk, target, head):
    arguments = [f"--target={target}", "--bucket=gs://b/", "--workdir=runs/A_b", *SPLIT, VALUE]
    shown = desk.launch(*arguments, "--env=A=1 $X", "--sky=--yes", "--dry_run")
    assert not desk.calls(), shown.stderr
    task = yaml.safe_load(shown.stdout)
    words = shlex.split(shown.stdout.splitlines()[0].removeprefix("# "))
    assert words[: len(head) + 2] == ["sky", *head, "--yes"]
    expected = {"EXP": "listops", "WORKDIR": "gs://b/runs/A_b", "ARGS": shlex.join([*SPLIT, VALUE])}
    expected |= {"BUCKET": "gs://b", "A": "1 $X"}
    assert task["envs"] == {**expected, "PACKAGE": "."}
    assert words[-6:] == [
        *(f"--env={k}={v}" for k, v in expected.items()),
        f"{TASKS / target}.yaml",
    ]
    done = desk.launch(*arguments, "--env=A=1 $X", "--sky=--yes")
    assert (done.returncode, desk.calls()) == (0, [["sky", words[1:], {}]])


@pytest.mark.parametrize("target", tasks())
def test_what_a_task_runs(desk, target):
    """Its setup installs extras that there are; its run passes on what was given."""
    task = yaml.safe_load(
        (TASKS / f"{target}.yaml").read_text().replace("/tmp/$USER-nrgpt", ".venv")
    )
    desk.has(desk.folder / ".venv/bin/nrgpt")
    given = {"EXP": "listops:a", "WORKDIR": "gs://a b", "ARGS": shlex.join(["--x=1", VALUE])}
    given |= {"BUCKET": "/b", "PACKAGE": ".", "HOME": str(desk.folder)}
    assert set(task["envs"]) <= set(given)
    assert desk.call("bash", "-c", task["setup"], **given).returncode == 0
    *_, (uv, words, _) = desk.calls()
    assert uv == "uv"
    assert mistake(shlex.join(["python", "-m", *words])) is None
    several = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    done = desk.call("bash", "-c", task["run"], **given, **several, SKYPILOT_NODE_RANK="1")
    assert done.returncode == 0, done.stderr
    [(_, words, seen)] = desk.calls()
    join = ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    assert mistake(shlex.join(["nrgpt", "train", "listops", *join])) is None
    assert words[:5] == ["train", "listops:a", "--workdir=gs://a b", "--x=1", VALUE]
    assert words[5:] == (join if task.get("num_nodes", 1) > 1 else [])
    [place] = task.get("file_mounts", {"/b/prepared": ""})
    assert seen == ({"NRGPT_CACHE_DIR": place} if "BUCKET" in task["envs"] else {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TPU[:2], "must be a multiple of 256 devices"),
        (["--target=slurm", "--bucket=/a"], "must be a multiple of 32 devices"),
        ([*TPU, "--config.model.embed=3"], "did you mean"),
        ([*TPU, "--config.seed", "3"], "--config.seed has no value"),
        ([*TPU, "--noconfig.model.learn_beta"], "write it as --config.model.learn_beta="),
        ([*TPU, "--config.data.path=https://a:b@c"], "credentials"),
        ([*TPU, "--env=A"], "--env='A' is not possible"),
        (["--target=moon", "--workdir=/a"], "there are gpu, multi_gpu, slurm, tpu"),
        (["--target=jobset", "--workdir=/a"], "there are gpu, multi_gpu, slurm, tpu"),
        (["--target=gpu"], "--workdir=runs/listops is lost"),
        (["--target=slurm", "--workdir=/a"], "needs BUCKET"),
        (TPU, "pip install 'nrgpt-jax[sky]'"),
    ],
)
def test_mistakes_end_in_one_line(desk, arguments, message):
    desk.environment["PATH"] = "/nowhere"
    done = desk.launch(*arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_slurm_queues_again_what_was_stopped(desk):
    given = {"EXP": "listops", "WORKDIR": "a b", "ARGS": shlex.quote(VALUE), "SLURM_JOB_ID": "17"}
    given |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}
    for code, before, again in [(0, 0, 0), (143, 0, 1), (143, 99, 1), (143, 100, 0), (2, 0, 0)]:
        more = {"FAKE_EXIT": str(code), "SLURM_RESTART_COUNT": str(before)}
        assert desk.call("bash", f"{TASKS}/train.sbatch", **given, **more).returncode == code
        (_, words, seen), *rest = desk.calls()
        program = [".venv/bin/nrgpt", "train", "listops", "--workdir=a b", VALUE]
        assert words == ["--cpus-per-task=8", *program]
        assert seen == {"JAX_LOCAL_DEVICE_IDS": "0,1"}
        assert [words for _, words, _ in rest] == [["requeue", "17"]] * again


def test_a_tpu_vm_gets_the_commit_and_trains_on_all_workers(desk):
    desk.environment |= {"TPU": "t", "ZONE": "z", "HOME": str(desk.folder)}
    desk.call("git", "init", "--quiet")
    desk.call("git", *shlex.split("-c user.name=a -c user.email=a commit -qm a --allow-empty"))
    desk.has(desk.folder / "nrgpt/.venv/bin/nrgpt")
    script, given = f"{TASKS}/tpu_vm.sh", {"EXP": "a", "WORKDIR": HOSTILE, "ARGS": "--x='1 2'"}
    assert desk.call(script, **given).returncode == 0
    *calls, (_, start, _) = desk.calls()
    assert [words[3] for _, words, _ in calls] == ["scp", "ssh"]
    desk.call("bash", "-c", start[-1].removeprefix("--command=") + " wait")
    [(_, words, _)] = desk.calls()
    assert words == ["train", "a", f"--workdir={HOSTILE}", "--x=1 2"]
    for action, workers in (("stop", "all"), ("logs", "0")):
        assert desk.call(script, action).returncode == 0
        [(_, words, _)] = desk.calls()
        assert words[3:7] == ["ssh", "t", "--zone=z", f"--worker={workers}"]


def test_the_jobset_is_of_one_slice_and_gives_up_after_a_mistake():
    jobset = yaml.safe_load((TASKS / "jobset.yaml").read_text())
    [jobs] = jobset["spec"]["replicatedJobs"]
    pods = jobs["template"]["spec"]
    pod = pods["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = pods["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == math.prod(map(int, topology.split("x")))
    assert pods["completions"] == pods["parallelism"]
    assert pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert mistake(shlex.join(container["command"])) is None


def test_skypilot_takes_the_task_files(tmp_path):
    """By itself, in its environment, without a network: its list of accelerators is a stand-in."""
    sky = shutil.which("sky", path=f"{ROOT}/.venv/sky/bin:{os.environ['PATH']}")
    if sky is None:
        pytest.skip("SkyPilot is not installed: make .venv/installed-sky")
    common = tmp_path / ".sky/catalogs/v8/common"
    common.mkdir(parents=True)
    (common / "accelerators.csv").write_text("AcceleratorName,Clouds\nH100,['GCP']\n")
    (common / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\n")
    given = dict.fromkeys(("EXP", "WORKDIR", "ARGS"), HOSTILE) | {"BUCKET": "gs://b"}
    for target in tasks():
        text = (TASKS / f"{target}.yaml").read_text()
        (tmp_path / f"{target}.yaml").write_text(filled(text, given))
    program = (
        "import sky, sys, json\nfor path in sys.argv[1:]:\n    task = sky.Task.from_yaml(path)\n"
    )
    program += "    task.validate()\n    print(json.dumps([task.num_nodes, task.envs]))"
    command = [f"{Path(sky).parent}/python", "-c", program, *map(str, tmp_path.glob("*.yaml"))]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if re.match(r"\[\d", line)]
    assert sorted(nodes for nodes, _ in found) == [1, 1, 4, 4]
    assert all(envs.items() >= given.items() for _, envs in found)
