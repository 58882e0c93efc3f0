"""Launching on clusters: SLURM scripts, manifests for GKE, calls of XPK; no cluster is reached."""

import shlex
import sys

import pytest
import yaml
from launch_helpers import FOLDER, GKE_GPU, GKE_TPU, SLURM, SPLIT, TRAIN, VALUE, XPK, Desk, expanded


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


# SLURM --------------------------------------------------------------------------------------------


def test_slurm_runs_one_task_a_node_with_all_its_gpus(desk):
    desk.has("sbatch", "srun")
    assert desk.launch(*SLURM, "--workdir=runs/a b", VALUE, "--env=A=1 $X").returncode == 0
    assert desk.calls() == [["sbatch", "launched/a-b.sbatch"]]
    batch = (desk.folder / "launched/a-b.sbatch").read_text()
    options = [line[8:] for line in batch.splitlines() if line.startswith("#SBATCH ")]
    assert options == [
        *(
            "--job-name=a-b",
            "--dependency=singleton",
            "--nodes=4",
            "--ntasks-per-node=1",
            "--gpus-per-node=2",
        ),
        *("--cpus-per-task=8", "--time=24:00:00", f"--chdir={desk.folder}"),
        *("--output=launched/a-b.log", "--open-mode=append", "--requeue", "--signal=TERM@120"),
        "--partition=gpu",
    ]
    assert "export JAX_LOCAL_DEVICE_IDS=0,1 " in batch
    assert "export A='1 $X'\n" in batch
    assert desk.call("bash", "launched/a-b.sbatch").returncode == 0
    (call,) = desk.calls()
    train = [sys.executable, *TRAIN, VALUE, "--workdir=runs/a b"]
    assert call == ["srun", "--cpus-per-task=8", *train]


def test_slurm_options_with_spaces_are_one_word(desk):
    desk.has("sbatch")
    given = ["--comment=a b", '--comment=a "b" #', "-p gpu"]
    assert desk.launch(*SLURM, "--workdir=a", *(f"--sbatch={x}" for x in given)).returncode == 0
    lines = (desk.folder / "launched/a.sbatch").read_text().splitlines()
    options = [shlex.split(line[8:], comments=True) for line in lines if "#SBATCH" in line]
    assert options[-3:] == [given[:1], given[1:2], ["-p", "gpu"]]


def test_slurm_queues_again_what_was_stopped(desk):
    desk.has("sbatch", "srun", "scontrol")
    desk.launch(*SLURM, "--workdir=runs/a")
    desk.calls()
    cases = [("0", "", 0), ("143", "", 1), ("143", "99", 1), ("143", "100", 0), ("2", "", 0)]
    for code, before, again in cases:
        given = {"FAKE_EXIT": code, "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": before}
        done = desk.call("bash", "launched/a.sbatch", **given)
        assert done.returncode == int(code)
        assert desk.calls().count(["scontrol", "requeue", "17"]) == again


def test_slurm_is_looked_after(desk):
    desk.has("scancel", "squeue")
    for action, program in (("stop", "scancel"), ("status", "squeue")):
        assert desk.launch(*SLURM, "--workdir=runs/a", f"--action={action}").returncode == 0
        assert desk.calls() == [[program, "--me", "--name=a"]]
    shown = desk.launch(*SLURM, "--workdir=runs/a", "--action=logs", "--dry_run")
    assert shown.stdout == "tail -n 100 -F launched/a.log\n"


# GKE ---------------------------------------------------------------------------------------------


def manifest(desk, *arguments):
    desk.has("kubectl")
    done = desk.launch(*arguments)
    assert done.returncode == 0, done.stderr
    _, (*call, file) = desk.calls()
    assert call == ["kubectl", "--namespace=default", "apply"]
    found = yaml.safe_load((desk.folder / file.removeprefix("--filename=")).read_text())
    (jobs,) = found["spec"]["replicatedJobs"]
    (container,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
    return found, jobs["template"]["spec"], container


def test_gke_manifest_of_a_tpu_slice(desk):
    found, pods, container = manifest(desk, *GKE_TPU, FOLDER, VALUE, "--env=A=$(B)")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "big-1"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 100
    (give_up,) = found["spec"]["failurePolicy"]["rules"]
    assert (give_up["action"], give_up["onJobFailureReasons"]) == (
        "FailJobSet",
        ["PodFailurePolicy"],
    )
    assert pods["parallelism"] == pods["completions"] == 64, "256 chips, 4 a node"
    assert (pods["completionMode"], pods["backoffLimit"]) == ("Indexed", 0)
    (rule,) = pods["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2], "mistakes are not tried again"
    pod = pods["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    words = [expanded(word, {"B": "no", "id": "no"}) for word in container["command"]]
    assert words == ["python", *TRAIN, *SPLIT, VALUE, "--workdir=/shared/runs/Big_1"]
    (variable,) = container["env"]
    assert (variable["name"], expanded(variable["value"], {"B": "no"})) == ("A", "$(B)")


def test_gke_manifest_of_nodes_with_gpus(desk):
    shared = ("--workdir=/shared/runs/a", "--service_account=s")
    _, pods, container = manifest(desk, *GKE_GPU, *shared)
    pod = pods["template"]["spec"]
    assert pods["parallelism"] == pods["completions"] == 2
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["serviceAccountName"] == "s"
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "nfs"}} in pod["volumes"]
    assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    (number,) = container["env"]
    index = number["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert [expanded(word, {number["name"]: "1"}) for word in container["command"][-3:]] == [
        "--coordinator_address=a-train-0-0.a:8476",
        "--num_processes=2",
        "--process_id=1",
    ]


def test_gke_takes_away_what_has_ended_and_nothing_else(desk):
    desk.has("kubectl")
    shown = desk.launch(*GKE_TPU, FOLDER, "--dry_run").stdout
    for state in ("", "Completed", "Failed"):
        assert desk.call("bash", "-ec", shown, FAKE_OUTPUT=state).returncode == 0
        ask, *delete, apply = desk.calls()
        assert ask[2:5] == ["get", "jobset", "big-1"]
        assert ask[-1] == "--output=jsonpath={.status.terminalState}"
        ended = ["delete", "jobset", "big-1", "--cascade=foreground"]
        assert [call[2:] for call in delete] == ([ended] if state else [])
        assert apply[2] == "apply"


def test_gke_is_looked_after(desk):
    desk.has("kubectl")
    kubectl = ["kubectl", "--namespace=n"]
    given = (*GKE_TPU, FOLDER, "--namespace=n")
    assert desk.launch(*given, "--action=stop").returncode == 0
    assert desk.calls() == [[*kubectl, "delete", "jobset", "big-1", "--cascade=foreground"]]
    assert desk.launch(*given, "--action=status").returncode == 0
    assert [call[:4] for call in desk.calls()] == [[*kubectl, "get", w] for w in ("jobset", "pods")]
    assert desk.launch(*given, "--action=logs").returncode == 0
    ((*call, selector),) = desk.calls()
    assert call == [*kubectl, "logs", "--follow", "--tail=100"]
    first = "jobset-name=big-1,batch.kubernetes.io/job-completion-index=0"
    assert selector == f"--selector=jobset.sigs.k8s.io/{first}"


def test_xpk_creates_a_workload(desk):
    desk.has("xpk")
    assert desk.launch(*XPK, "--project=p", FOLDER, VALUE, "--env=A=1 $X").returncode == 0
    ((*call, command),) = desk.calls()
    assert call == [
        *("xpk", "workload", "create", "--workload=big-1"),
        *("--cluster=c", "--zone=z", "--project=p"),
        *("--tpu-type=v5litepod-256", "--docker-image=r/i:1", "--max-restarts=100"),
        "--restart-on-exit-codes=1",
        *("--termination-grace-period-seconds=120", "--env=A=1 $X"),
    ]
    words = shlex.split(command.removeprefix("--command="))
    assert words == ["exec", "python", *TRAIN, *SPLIT, VALUE, "--workdir=/shared/runs/Big_1"]
