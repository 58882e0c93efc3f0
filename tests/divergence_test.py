"""Updates that are not finite are left out; too many end the run, which can then go on."""

import json
import re

import numpy as np
import pytest
from train_helpers import config_in, values

from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.training import divergence, loop, trainer
from nrgpt_jax.training.divergence import Spike, SpikeWatch

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.ci]


@pytest.fixture
def config(tmp_path):
    config = config_in(tmp_path)
    config.log_every = 1
    return config


def spoil(monkeypatch, *numbers):
    """Batches (by number, from 0) whose weights are not numbers."""
    train_batches = trainer.train_batches

    def spoiled(stream, length, size, seed, rows=None, first=0):
        for number, batch in enumerate(train_batches(stream, length, size, seed, rows, first)):
            bad = first + number in numbers
            yield batch._replace(weights=batch.weights * np.float32("nan")) if bad else batch

    monkeypatch.setattr(trainer, "train_batches", spoiled)


def steps_of(workdir, kind="latest"):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.steps(kind)


def test_a_step_that_is_not_finite_is_left_out_and_counted(config, tmp_path, monkeypatch):
    spoil(monkeypatch, 3, 6, 7)
    last = loop.train(config, tmp_path / "run")
    lines = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert [r["train/skipped_steps"] for r in lines] == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    assert [r["step"] for r in lines if r["train/loss"] is None] == [4, 7, 8]
    assert np.isfinite(last["val/loss"])
    assert lines[7]["train/learning_rate"] == lines[5]["train/learning_rate"], "2 more left out"
    assert steps_of(tmp_path / "run") == [8, 12]


def test_too_many_in_a_row_end_the_run_and_the_advice_works(config, tmp_path, monkeypatch):
    """From step 7 on, the state of which was saved (step 6), and is best at an evaluation then."""
    config.update({"checkpoint_every": 1, "max_skipped_steps": 3, "eval_every": 8})
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, *range(6, 100))
        with pytest.raises(UserError) as error:
            loop.train(config, workdir)
    for part in ("not finite in 3 steps in a row", "step_7.npz", "resumes from the checkpoint of"):
        assert part in str(error.value)
    batch = np.load(workdir / "diverged/step_7.npz")
    assert batch["step"] == 7
    assert batch["inputs"].shape == (8, 16)
    assert np.isnan(batch["weights"]).all()
    assert (workdir / "diverged/checkpoint_6/checksums.json").exists()
    assert steps_of(workdir) == [5]
    assert re.search(r"of step 5$", str(error.value))
    config.optimizer.learning_rate = 1e-3
    assert np.isfinite(loop.train(config, workdir)["val/loss"])
    assert read_metrics(workdir)[-1]["step"] == 12
    with Checkpoints(workdir) as checkpoints:
        losses = [r["val/loss"] for r in read_metrics(workdir) if "val/loss" in r]
        assert checkpoints.best_loss() == min(losses), "not of the course that was left"
    history = json.loads((workdir / "config.json").read_text())["record"]["history"]
    assert [entry["since_step"] for entry in history] == [0, 5]
    assert "optimizer.learning_rate=0.01 there, 0.001 here" in history[1]["changes"]


@pytest.mark.slow
def test_a_learning_rate_that_breaks_the_state_is_survived(config, tmp_path):
    """The state after the first step at 1e38 is finite, and every loss after it is not."""
    workdir = tmp_path / "run"
    config.update({"checkpoint_every": 1, "max_skipped_steps": 2, "train_steps": 4})
    loop.train(config, workdir)
    rate = config.optimizer.learning_rate
    config.update({"train_steps": 20, "eval_every": 100})
    config.optimizer.update({"learning_rate": 1e38, "clip_norm": 0.0})
    with pytest.raises(UserError, match="resumes from the checkpoint of step 4"):
        loop.train(config, workdir)
    config.optimizer.learning_rate = rate
    assert np.isfinite(loop.train(config, workdir)["val/loss"])


@pytest.mark.slow
def test_a_spike_sends_the_run_back_with_other_data(config, tmp_path, monkeypatch):
    config.update({"checkpoint_every": 2, "spike_factor": 1.5, "train_steps": 12})
    see, train_batches = SpikeWatch.see, trainer.train_batches
    leapt: list[int] = []
    firsts: list[int] = []

    def noted(*arguments):
        firsts.append(arguments[-1])
        return train_batches(*arguments)

    def leap_once(watch, step, loss):
        if step == 9 and not leapt:
            leapt.append(step)
            loss *= 100
        see(watch, step, loss)

    with monkeypatch.context() as patch:
        patch.setattr(SpikeWatch, "see", leap_once)
        patch.setattr(trainer, "train_batches", noted)
        loop.train(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        loop.train(config, tmp_path / "undisturbed")
    there, here = (
        {r["step"]: r["train/loss"] for r in values(tmp_path / name) if "train/loss" in r}
        for name in ("undisturbed", "run")
    )
    assert firsts == [0, 9], "the batches after that of the spike"
    assert list(here) == list(there), "every step is there once"
    assert [s for s in here if here[s] != there[s]] == [9, 10, 11, 12]


def test_a_watch_of_spikes_goes_on_where_it_was():
    watch = SpikeWatch(2.0)
    for step in range(6):
        watch.see(step, 1.0)
    again = SpikeWatch(2.0, json.loads(json.dumps(watch.record())))
    again.see(7, 1.9)
    with pytest.raises(Spike, match=r"leapt to 2\.3 at step 8"):
        again.see(8, 2.3)
    assert again.went_back(watch.record()).rollbacks == 1
    SpikeWatch(0.0, watch.record()).see(9, 1e9)  # none is
    assert divergence.MOST_ROLLBACKS > 0
