"""Several processes: they train as one does, stop together, and fail together in one line."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from programs_helpers import Running, program
from train_helpers import TEXT

from nrgpt_jax import processes
from nrgpt_jax.errors import STOPPED, UserError
from studies.programs import arguments_of, devices, start_together

pytestmark = pytest.mark.ci

FIELDS = {
    "train_steps": 12,
    "log_every": 1,
    "eval_every": 6,
    "eval_windows": 4,
    "checkpoint_every": 4,
    "model.context_length": 16,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.num_steps": 2,
    "model.dropout": 0.1,
    "model.vocab_size": 32,
    "data.batch_size": 8,
    "optimizer.accumulation_steps": 2,
    "optimizer.schedule": "constant",  # so that losses do not depend on where a run ends
}
FOREVER = 100_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT)
    return path


def arguments(corpus, workdir, **fields):
    given = {**FIELDS, "data.path": corpus, **fields}
    return ["--config=experiments/text.py", f"--workdir={workdir}", *arguments_of(given)]


def alone(corpus, workdir, count, **fields):
    """Trains in one process with so many devices."""
    flags = devices(count, os.environ["XLA_FLAGS"])
    done = program("train", *arguments(corpus, workdir, **fields), environment=flags)
    assert done.returncode == 0, done.stderr


def start_two(*of_each, count=2):
    """Two processes with so many devices each, and these arguments."""
    return start_together(of_each, devices(count, os.environ["XLA_FLAGS"]))


def wait_for(workdir, step, running):
    """Until the metrics of a step are written."""
    while not any(record["step"] >= step for record in records(workdir)):
        assert all(process.is_running() for process in running), running[0].end().stderr
        time.sleep(0.05)


def records(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(workdir):
    names = "train/loss", "train/grad_norm", "val/loss"
    return {(r["step"], n): r[n] for r in records(workdir) for n in names if n in r}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that one process with one device has made."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    alone(corpus, workdir, 1)
    return workdir


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints/latest").iterdir())


def assert_losses_are_those_of(whole, workdir, corpus, tmp_path):
    """Of one device, which goes on as far."""
    end = max(record["step"] for record in records(workdir))
    other = shutil.copytree(whole, tmp_path / "whole")
    alone(corpus, other, 1, train_steps=end)
    found, wanted = losses(workdir), losses(other)
    assert found.keys() == wanted.keys()
    keys = sorted(wanted)
    np.testing.assert_allclose([found[k] for k in keys], [wanted[k] for k in keys], rtol=1e-5)


@pytest.mark.long
def test_a_signal_to_one_stops_both_after_the_same_step(corpus, tmp_path):
    workdir = tmp_path / "run"
    short = {"model.dropout": 0.0, "optimizer.accumulation_steps": 1}  # to compile
    given = arguments(corpus, workdir, train_steps=FOREVER, **short)
    both = start_two(given, given, count=1)
    wait_for(workdir, 3, both)
    both[1].send(signal.SIGTERM)
    first, second = (process.end() for process in both)
    assert first.returncode == second.returncode == STOPPED
    last = saved(workdir)[-1]
    assert f"stopped at step {last} and saved" in first.stderr
    assert "saved" not in second.stderr, "one of them speaks"
    assert max(record["step"] for record in records(workdir)) == last


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(1, {}), (4, {}), (4, {"mesh.fsdp": 2})])
def test_killed_and_gone_on_with_other_devices_is_the_same(corpus, whole, tmp_path, count, mesh):
    workdir = tmp_path / "run"
    given = arguments(corpus, workdir, **{"mesh.fsdp": 2, "train_steps": FOREVER})
    both = start_two(given, given)
    wait_for(workdir, 13, both)
    for process in both:
        process.send(signal.SIGKILL)
    for process in both:
        process.end()
    alone(corpus, workdir, count, **mesh, train_steps=saved(workdir)[-1] + 2)
    assert_losses_are_those_of(whole, workdir, corpus, tmp_path)


@pytest.mark.slow
def test_a_run_of_one_goes_on_as_two(corpus, whole, tmp_path):
    workdir = tmp_path / "run"
    given = arguments(corpus, workdir, train_steps=FOREVER)
    one = Running("train", *given, environment=devices(4, os.environ["XLA_FLAGS"]))
    wait_for(workdir, 13, [one])
    one.send(signal.SIGKILL)
    one.end()
    end = saved(workdir)[-1] + 2
    given = arguments(corpus, workdir, **{"mesh.tensor": 2, "train_steps": end})
    for process in start_two(given, given):
        done = process.end()
        assert done.returncode == 0, done.stderr
    assert_losses_are_those_of(whole, workdir, corpus, tmp_path)


@pytest.mark.slow
def test_two_begin_with_a_trained_model_as_one_does(corpus, whole, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone(corpus, one, 1, init_from=whole, train_steps=6)
    given = arguments(corpus, two, init_from=whole, train_steps=6)
    ended = [process.end() for process in start_two(given, given)]
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    found, wanted = losses(two), losses(one)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert wanted[1, "train/loss"] < losses(whole)[1, "train/loss"]


@pytest.mark.slow
def test_processes_that_differ_end_in_one_line_each(corpus, tmp_path):
    other = shutil.copy(corpus, tmp_path / "other.txt")
    with open(other, "a") as file:
        file.write("and one more line")
    missing = tmp_path / "missing.txt"
    cases: list = [
        ({"model.num_steps": 3}, "model.num_steps=2 there, 3 here"),
        ({"data.path": other}, "data.fingerprint"),
        ({"data.path": missing}, f"data.path={missing} does not exist"),
    ]
    cases = [(arguments(corpus, tmp_path / "a", **fields), message) for fields, message in cases]
    another = arguments(corpus, tmp_path / "b"), "is not one folder that all hosts share"
    for given, message in (*cases, another):
        for process in start_two(arguments(corpus, tmp_path / "a"), given):
            done = process.end()
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert done.returncode == 2, done.stderr
            assert len(errors) == 1
            assert message in errors[0]


def test_one_process_agrees_with_itself():
    assert processes.gather_texts("héllo") == ["héllo"]
    assert processes.raise_on_all_hosts(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^no$"):
        processes.raise_on_all_hosts(lambda: (_ for _ in ()).throw(UserError("no")))
    assert jax.process_count() == 1
    assert processes.is_first()
