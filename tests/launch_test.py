"""Launching: the exact commands of every target, shown and carried out, with values of any kind.

No cloud is reached: gcloud, sbatch, kubectl and xpk are programs that write down their arguments.
"""

import os
import shlex
import signal
import sys
import time

import pytest
from launch_helpers import (
    FOLDER,
    GCLOUD,
    GKE,
    GKE_GPU,
    GKE_TPU,
    HOSTILE,
    SLURM,
    TPU,
    TRAIN,
    VALUE,
    XPK,
    Desk,
    write_program,
)
from make_helpers import calls_of_make
from marks import slow_but

from nrgpt_jax.errors import UserError
from nrgpt_jax.launching.plan import Plan, carry_out, job_name


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.mark.parametrize(
    "target", slow_but([TPU, SLURM], [TPU, SLURM, GKE_TPU, GKE_GPU, XPK]), ids=lambda t: t[0][9:]
)
def test_the_script_that_is_shown_does_what_the_program_does(desk, target):
    desk.has("gcloud", "sbatch", "kubectl", "xpk")
    given = [*target, FOLDER, VALUE, "--env=A=1 $X"]
    shown = desk.launch(*given, "--dry_run")
    assert shown.returncode == 0, shown.stderr
    assert not desk.calls(), "a dry run starts nothing"
    assert not (desk.folder / "launched").exists()
    assert desk.call("bash", "-n", "-c", shown.stdout).returncode == 0
    assert desk.call("bash", "-ec", shown.stdout).returncode == 0
    by_script, written = desk.calls(), records(desk)
    for path in written:
        path.unlink()
    done = desk.launch(*given)
    assert done.returncode == 0, done.stderr
    assert desk.calls() == by_script != []
    assert records(desk) == written


def records(desk):
    files = [p for p in desk.folder.glob("launched/*") if p.suffix != ".gz"]
    return {path: path.read_text() for path in files}


# TPU ----------------------------------------------------------------------------------------------


def test_tpu_copies_installs_and_starts_on_all_workers(desk):
    desk.has("gcloud")
    assert desk.launch(*TPU, "--project=p", FOLDER, VALUE, "--env=A=1 $X").returncode == 0
    copy, install, start = desk.calls()
    at = ["--zone=us-x1-a", "--project=p", "--worker=all"]
    assert copy == [*GCLOUD, "scp", "launched/big-1.tar.gz", "my-tpu:nrgpt.tar.gz", *at]
    for call in (install, start):
        assert call[:-1] == [*GCLOUD, "ssh", "my-tpu", *at]
        assert call[-1].startswith("--command=")
    packed = desk.call("tar", "-tzf", "launched/big-1.tar.gz").stdout
    assert "experiments" in packed.split()
    assert "--editable '.[tpu,hf]'" in install[-1]
    assert "nohup env 'A=1 $X' .venv/bin/python -m" in start[-1]
    python = desk.home / "nrgpt/.venv/bin/python"
    write_program(python)
    started = desk.call("bash", "-c", start[-1].removeprefix("--command="))
    assert "big-1 runs as process" in started.stdout
    (called,) = wait_for(desk.calls)
    assert called == ["python", *TRAIN, VALUE, "--workdir=/shared/runs/Big_1"]


def test_tpu_installs_into_a_folder_that_keeps_its_runs(desk):
    """With recorders for uv and pip; the code of an earlier commit is gone."""
    desk.has("gcloud", "python3")
    desk.launch(*TPU, FOLDER)
    _, install, _ = desk.calls()
    home = desk.home / "nrgpt"
    write_program(home / ".uv/bin/uv")
    (home / "runs").mkdir()
    (home / "nrgpt_jax").mkdir()
    os.rename(desk.folder / "launched/big-1.tar.gz", desk.home / "nrgpt.tar.gz")
    done = desk.call("bash", "-c", install[-1].removeprefix("--command="))
    assert done.returncode == 0, done.stderr
    make, fill = desk.calls()
    assert make == ["uv", "venv", "--quiet", "--python", "3.11", ".venv"]
    pinned = ["--constraint", "constraints.txt", "--editable", ".[tpu,hf]"]
    assert fill == ["uv", "pip", "install", "--quiet", "--python", ".venv/bin/python", *pinned]
    assert (home / "runs").is_dir()
    assert (home / "experiments").exists()
    assert not (home / "nrgpt_jax").exists()


def test_tpu_is_looked_after(desk):
    desk.has("gcloud")
    for action, worker in (("stop", "all"), ("logs", "0"), ("status", "0")):
        assert desk.launch(*TPU, FOLDER, f"--action={action}").returncode == 0
        (call,) = desk.calls()
        assert call[:-1] == [*GCLOUD, "ssh", "my-tpu", "--zone=us-x1-a", f"--worker={worker}"]


# One machine --------------------------------------------------------------------------------------

SAVING = f"""#!{sys.executable}
import signal, sys, time
def save(*_):
    print("saved", sys.argv[1:], flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_in_the_background_it_is_started_once_and_saves_when_stopped(desk):
    """As on a TPU worker: by the script of its `start`, whose connection is closed then."""
    desk.has("gcloud")
    write_program(desk.home / "nrgpt/.venv/bin/python", SAVING)
    scripts = {}
    for action in ("start", "stop", "status"):
        desk.launch(*TPU, FOLDER, VALUE, f"--action={action}")
        scripts[action] = desk.calls()[-1][-1].removeprefix("--command=")
    run = lambda action: desk.call("bash", "-c", scripts[action])
    log = desk.home / "nrgpt/launched/big-1.log"
    assert run("start").returncode == 0
    try:
        wait_for(lambda: "ready" in log.read_text())
        assert "big-1 runs" in run("status").stdout
        again = run("start")
        assert (again.returncode, again.stderr) == (1, "big-1 is running already\n")
        assert f"saved {[*TRAIN, VALUE, '--workdir=/shared/runs/Big_1']}" in run("stop").stdout
        assert "big-1 does not run" in run("stop").stdout
        assert "big-1 does not run" in run("status").stdout
    finally:
        if "saved" not in log.read_text():
            os.kill(int(log.with_suffix(".pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("action", ["status", "logs", "stop"])
def test_what_never_ran_is_told_in_one_line(desk, action):
    done = desk.launch("--workdir=runs/a", f"--action={action}")
    assert (done.returncode, done.stdout) == (0, "a was never started here\n")
    assert not done.stderr


def test_here_it_runs_with_this_python(desk):
    shown = desk.launch("--workdir=runs/a", "--dry_run").stdout
    bash, option, script = shlex.split(shown)
    assert (bash, option) == ("bash", "-c")
    train = shlex.join([sys.executable, *TRAIN, "--workdir=runs/a"])
    assert f"nohup {train} >> launched/a.log 2>&1 < /dev/null &\n" in script


def wait_for(found, seconds=30.0):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


# Mistakes and make --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=moon", FOLDER], "<tpu|slurm|gke|xpk|local>"),
        (["--target=tpu", "--tpu=a", FOLDER], "a TPU needs its name and zone"),
        ([*TPU, "--commit=nope", FOLDER], "--commit='nope' is no commit"),
        ([*TPU, FOLDER], "gcloud is not installed here"),
        ([*SLURM, "--workdir=runs/a"], "sbatch is not installed here"),
        ([*SLURM, "--gpus=0", FOLDER], "--gpus=0 is not possible"),
        ([*SLURM, "--time=soon", FOLDER], "--time='soon' is no time limit"),
        ([*SLURM, "--sbatch=gpu", FOLDER], "--sbatch='gpu' is no option of sbatch"),
        ([*GKE, FOLDER], "GKE needs --image"),
        ([*GKE_TPU, "--workdir=runs/a"], "would be lost with its container"),
        ([*GKE_TPU, "--claim=", "--workdir=/shared/a"], "would be lost with its container"),
        ([*GKE_TPU, "--chips=3", FOLDER], "the 256 chips of 16x16 must be whole nodes"),
        ([*GKE_TPU, "--topology=16", FOLDER], "--topology='16' is none"),
        (["--target=xpk", FOLDER], "XPK needs --cluster"),
        ([*XPK, "--workdir=runs/a"], "would be lost with its container"),
        (
            ["--workdir=/shared/2024-07-01"],
            "--workdir=/shared/2024-07-01 gives the job no name; give",
        ),
        (["--name=7", FOLDER], "--name='7' is not possible"),
        ([*SLURM, "--nodes=5", FOLDER], "must be a multiple of 10 devices"),
        ([*GKE_TPU, "--config.mesh.tensor=1", FOLDER], "must be a multiple of 256 devices"),
        ([*XPK, "--config.mesh.tensor=1", FOLDER], "must be a multiple of 256 devices"),
        ([*GKE_TPU, "--topology=", FOLDER], "is of TPUs: give --topology"),
        (["--env=A", FOLDER], "--env='A' is not possible"),
        (["--config.seed", "3", FOLDER], "--config.seed has no value"),
        (["stray", FOLDER], "unexpected argument"),
        (["--config=experiments/nope.py", FOLDER], "there is no experiment"),
        (["--config.model.embed=3", FOLDER], "did you mean"),
    ],
)
def test_mistakes_end_in_one_line(desk, arguments, message):
    for program in ("git", "bash", "mkdir"):  # and nothing else is installed
        path = next(p for d in os.environ["PATH"].split(":") if os.access(p := f"{d}/{program}", 1))
        (desk.bin / program).symlink_to(path)
    desk.environment["PATH"] = str(desk.bin)
    done = desk.launch(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (desk.folder / "launched").exists()


def test_a_program_that_fails_is_named(desk):
    desk.has("sbatch")
    desk.environment["FAKE_EXIT"] = "7"
    done = desk.launch(*SLURM, "--workdir=runs/a")
    assert done.returncode == 2
    assert done.stderr == "error: sbatch launched/a.sbatch ... has failed (exit code 7)\n"


def test_a_script_that_fails_is_named_in_one_line():
    with pytest.raises(UserError) as failed:
        carry_out(Plan([["bash", "-c", "exit 3\n# and more"]]))
    assert str(failed.value) == "bash -c exit 3 ... has failed (exit code 3)"


def test_names_of_jobs():
    assert job_name("/shared/runs/Open_WebText.1/") == "open-webtext-1"
    assert job_name("runs/7b-" + "x" * 60) == "b-" + "x" * 37
    assert job_name("a") == "a"


def test_make_passes_values_on(tmp_path):
    given = {"TPU": HOSTILE, "ZONE": "z", "WORKDIR": "/shared/a b", "EXP": "shakespeare:paper"}
    given |= {"DRY_RUN": "1", "ARGS": "--config.seed=1 --env='A=1 2'"}
    words = [f"{name}={value}" for name, value in given.items()]
    (call,), done = calls_of_make(f"make launch {shlex.join(words)}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert call == [
        *("nrgpt_jax.launch", "--config=experiments/shakespeare.py:paper"),
        *("--workdir=/shared/a b", "--target=tpu", "--dry_run=1"),
        *(f"--tpu={HOSTILE}", "--zone=z", "--config.seed=1", "--env=A=1 2"),
    ]
