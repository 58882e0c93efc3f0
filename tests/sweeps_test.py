"""Sweeps: every run once, whatever stops them; what fails is told apart."""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from train_helpers import TEXT, config_in, save_untrained

from nrgpt_jax import disk, sweep
from nrgpt_jax.configs import with_seeds
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.directory import in_use, locked
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.sweeps import engine, progress
from nrgpt_jax.sweeps.engine import Launcher, Training, run_all
from nrgpt_jax.sweeps.side_by_side import groups, train_directories
from nrgpt_jax.training.loop import train

ROOT = Path(__file__).resolve().parent.parent
SEEDS, RATES, PARTS = (0, 3), (5e-3, 1e-2), (0.5, 1.0)
EXPERIMENT = """
from nrgpt_jax.configs import with_seeds
from train_helpers import config_of

def get_sweep(scale):
    config = config_of({corpus!r})
    config.eval_every, config.checkpoint_every = 20, 10
    return with_seeds({{"small": config}}, seeds=3)
"""


@pytest.fixture
def config(tmp_path):
    """Of a model with random depths, without dropout."""
    config = config_in(tmp_path)
    config.model.dropout = 0.0
    config.depth.update(
        {"distribution": "uniform", "min_steps": 1, "max_steps": 4, "backprop_steps": 2}
    )
    return config


class InThisProcess:
    """An executor that trains at once."""

    def __init__(self, *_, **__): ...

    update_parameters, batch = __init__, lambda self: contextlib.nullcontext()

    def submit(self, training):
        dataclasses.replace(training, sweep=None)()
        return SimpleNamespace(done=lambda: True, exception=lambda: None)


def varied(config, seed, rate, part):
    """The configuration with another seed, learning rate and part of the data."""
    own = config.copy_and_resolve_references()
    own.seed, own.data.train_fraction = seed, part
    own.optimizer.final_learning_rate *= rate / own.optimizer.learning_rate
    own.optimizer.learning_rate = rate
    return own


def finish(config, workdir):
    """Leaves what a run leaves that was trained to its end."""
    recorded = config.copy_and_resolve_references()
    recorded.model.vocab_size = 9
    workdir.mkdir(parents=True, exist_ok=True)
    disk.write_json(workdir / "config.json", recorded.to_dict())
    (workdir / "model.safetensors").touch()
    line = {"step": config.train_steps, "val/loss": 1.0 + config.seed}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_what_is_done_is_left_and_what_fails_is_told_apart(config, tmp_path, monkeypatch):
    made = []

    def pretend(config, workdir):
        made.append(workdir.name)
        if config.seed == 1:
            raise UserError("diverged here")
        finish(config, workdir)

    monkeypatch.setattr(engine, "train", pretend)
    monkeypatch.setattr(engine.submitit, "AutoExecutor", InThisProcess)
    monkeypatch.setattr(engine, "prepare", list)
    configs = {tmp_path / name: c for name, c in with_seeds({"v": config}, 3).items()}
    looks = []
    watch = lambda: looks.append(progress.status(configs)[0])
    failed = run_all(configs, Launcher(jobs=1), watch=watch)
    assert failed == {tmp_path / "v/1": "UserError: diverged here"}
    assert made == ["0", "1", "2"]
    assert looks[-1] == "2 done, 1 failed"
    assert progress.status(configs)[1] == "  v/1: failed: UserError: diverged here"
    assert run_all(configs, Launcher(jobs=1)) == failed
    assert made == ["0", "1", "2"]
    monkeypatch.setattr(progress, "parameters", lambda workdir: 7)
    path = tmp_path / "summary.csv"
    progress.write_summary(path, configs)
    rows = list(csv.DictReader(path.open()))
    assert [(r["run"], r["state"], r["val/loss"], r["seed"]) for r in rows] == [
        ("v/0", "done", "1.0", "0"),
        ("v/1", "failed", "", "1"),
        ("v/2", "done", "3.0", "2"),
    ]
    run_all(configs, Launcher(jobs=1), retry=True)
    assert made == ["0", "1", "2", "1"]
    finish(configs[tmp_path / "v/1"], tmp_path / "v/1")  # as `make train` may, beside the sweep
    assert run_all(configs, Launcher(jobs=1)) == {}
    configs[tmp_path / "v/0"].train_steps += 1
    with pytest.raises(UserError, match="v/0 holds another run: train_steps=12 there, 13 here"):
        run_all(configs, Launcher(jobs=1))


def test_a_run_waits_for_the_one_whose_model_it_begins_with(config, tmp_path, monkeypatch):
    """And is left where that is not trained, for whatever reason."""
    made = []

    def train_but_one(config, workdir):
        made.append(str(workdir.relative_to(tmp_path)))
        if workdir.name != "1":
            finish(config, workdir)

    monkeypatch.setattr(engine, "train", train_but_one)
    monkeypatch.setattr(engine.submitit, "AutoExecutor", InThisProcess)
    monkeypatch.setattr(engine, "prepare", list)
    after = config.copy_and_resolve_references()
    after.init_from = "{workdir}/../../first/{seed}"
    configs = with_seeds({"second": after, "first": config}, 2)
    assert run_all({tmp_path / name: c for name, c in configs.items()}, Launcher(jobs=1)) == {}
    assert made == ["first/0", "first/1", "second/0"]


def test_a_run_that_another_process_trains_is_left_to_it(config, tmp_path):
    workdir = tmp_path / "v/0"
    other = varied(config, 1, RATES[1], 1.0)
    with locked(workdir):
        assert progress.progress(workdir, config).state == "training"
        Training({workdir: config})()
        Training({workdir: config, tmp_path / "v/1": other})()
    assert progress.progress(workdir, config).state == "waiting"
    assert not progress.failure_of(workdir)
    assert not progress.failure_of(tmp_path / "v/1")


def test_a_setting_that_is_not_possible_is_said_before_anything_is_trained(config, tmp_path):
    config.optimizer.name = "nope"
    with pytest.raises(UserError, match=r"optimizer\.name='nope'"):
        run_all({tmp_path / "v/0": config}, Launcher())
    assert not (tmp_path / "v").exists()


def test_a_part_of_the_data_is_its_beginning(config):
    whole = load_dataset(config.data)
    config.data.train_fraction = 0.25
    part = load_dataset(config.data)
    count = round(len(whole.train) / 4)
    assert part.train.tokens.tolist() == whole.train.tokens[:count].tolist()
    assert part.validation.tokens.tolist() == whole.validation.tokens.tolist()


def test_who_only_looks_leaves_nothing(tmp_path):
    assert not in_use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_that_differ_in_what_can_be_side_by_side_are_grouped(config):
    runs = {Path(f"a/{s}{r}"): varied(config, s, r, p) for s in SEEDS for r in RATES for p in PARTS}
    other = config.copy_and_resolve_references()
    other.model.embed_dim = 8
    found = groups({**runs, Path("b/0"): other})
    assert [len(group) for group in found] == [len(runs), 1]
    config.init_from = "{workdir}/../../trained/{seed}"
    begins = {
        Path(f"{way}/{seed}"): varied(config, seed, 0.1, 1.0) for way in "ab" for seed in (0, 1)
    }
    assert [len(group) for group in groups(begins)] == [4]
    config.init_from = "{workdir}/../trained"
    begins = {workdir: varied(config, int(workdir.name), 0.1, 1.0) for workdir in begins}
    assert [len(group) for group in groups(begins)] == [2, 2]


def test_options_of_a_cluster_are_numbers_or_words():
    assert sweep.options(["timeout_min=60", "slurm_partition=a=b"]) == {
        "timeout_min": 60,
        "slurm_partition": "a=b",
    }
    with pytest.raises(UserError, match="NAME=VALUE"):
        sweep.options(["timeout"])


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (Launcher("nope"), "launcher='nope'"),
        (Launcher(options={"timeout_min": 1}), "it is of the launcher slurm"),
        (Launcher("slurm"), "the cluster does not take the jobs"),  # here is none
    ],
)
def test_a_wrong_launcher_or_option_is_said_in_a_line(config, tmp_path, launcher, message):
    with pytest.raises(UserError, match=message):
        run_all({tmp_path / "v/0": config}, launcher)


@pytest.mark.slow
def test_what_stops_a_sweep_leaves_nothing_out_of_its_table(tmp_path):
    corpus, experiment = tmp_path / "text.txt", tmp_path / "e.py"
    corpus.write_text(TEXT)
    experiment.write_text(EXPERIMENT.format(corpus=str(corpus)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def start(folder):
        command = [sys.executable, "-m", "nrgpt_jax.sweep", f"--sweep={experiment}"]
        command += [f"--runs={tmp_path / folder}", "--jobs=1", "--config.train_steps=60"]
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(command, start_new_session=True, stdout=nowhere, env=environment)

    def stopped(folder, stop, number):
        begun = start(folder)
        while not list((tmp_path / folder).glob("small/*/checkpoints/latest/*")):
            time.sleep(0.05)
            assert begun.poll() is None
        stop(begun.pid, number)
        code = begun.wait()
        while in_use(tmp_path / folder / "small/0"):  # it saves
            time.sleep(0.1)
        return code

    assert start("whole").wait() == 0
    assert stopped("stopped", os.killpg, signal.SIGINT) == 128 + signal.SIGINT
    assert not (tmp_path / "stopped/small/1/metrics.jsonl").exists()
    assert stopped("killed", os.kill, signal.SIGKILL) == -signal.SIGKILL  # not those that train
    whole = (tmp_path / "whole/summary.csv").read_text()
    assert whole.count(",done,60,") == 3
    for folder in ("stopped", "killed"):
        assert not (tmp_path / folder / "summary.csv").exists()
        assert start(folder).wait() == 0
        assert (tmp_path / folder / "summary.csv").read_text() == whole


@pytest.mark.slow
def test_a_process_that_is_killed_takes_no_other_run_with_it(config, tmp_path, monkeypatch):
    """By a plugin, which the processes that train find as this one does."""
    kill = "if 'SUBMITIT_EXECUTOR' in os.environ:\n    os.kill(os.getpid(), 9)\n"
    (tmp_path / "killing.py").write_text(f"import os\n{kill}")
    monkeypatch.syspath_prepend(tmp_path)
    configs = {tmp_path / name: c for name, c in with_seeds({"v": config}, 2).items()}
    configs[tmp_path / "v/0"].plugins = ("killing",)
    failed = run_all(configs, Launcher(jobs=2))
    assert list(failed) == [tmp_path / "v/0"]
    assert progress.is_done(tmp_path / "v/1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "depth",
    [
        {},
        {"refine_passes": 1, "max_burn_in_passes": 2, "consistency": 0.5},
        {"distribution": "fixed", "min_steps": 0, "max_steps": 0, "train_on_decoded": True},
    ],
)
def test_runs_side_by_side_end_where_one_by_one_they_do(
    config, tmp_path, standard_promotion, depth
):
    del standard_promotion
    if depth:
        config.model.mask = "strict"
        config.depth.update({"backprop_steps": 0, **depth})
    config.init_from = str(tmp_path / "begin/{seed}")
    for seed in SEEDS:
        save_untrained(config, tmp_path / f"begin/{seed}", seed + 5)
    cells = [(seed, rate, part) for seed in SEEDS for rate in RATES for part in PARTS]
    own = {tmp_path / "_".join(map(str, cell)): varied(config, *cell) for cell in cells}
    train_directories(own)
    cell = SEEDS[1], RATES[1], PARTS[0]
    alone, together = tmp_path / "alone", tmp_path / "_".join(map(str, cell))
    train(varied(config, *cell), alone)
    assert progress.is_done(together)
    found, expected = (progress.progress(w, config).losses for w in (together, alone))
    assert found == pytest.approx(expected, rel=1e-3)
    loaded, trained = load_pretrained(together), load_pretrained(alone, "latest")
    assert loaded.config.seed == SEEDS[1]
    assert loaded.config.optimizer == trained.config.optimizer
    assert loaded.config.data == trained.config.data

    def distance(other):
        """Over all parameters together: single ones may follow the sign of noise."""
        leaves = [jax.tree.leaves(p.variables) for p in (loaded, load_pretrained(other, "latest"))]
        return sum(float(np.sum((a - b) ** 2)) for a, b in zip(*leaves, strict=True)) ** 0.5

    for other in ((SEEDS[0], *cell[1:]), (cell[0], RATES[0], cell[2]), (*cell[:2], PARTS[1])):
        assert distance(alone) < 0.1 * distance(tmp_path / "_".join(map(str, other)))


def test_what_cannot_be_side_by_side_is_said_before_it_is_trained(config, tmp_path):
    config.optimizer.schedule = "exponential"
    with pytest.raises(UserError, match=r"optimizer\.schedule='exponential' .* side by side"):
        train_directories({tmp_path / "run": config})


@pytest.mark.slow
def test_a_training_that_diverges_has_no_loss_side_by_side(config, tmp_path, standard_promotion):
    del standard_promotion
    config.max_skipped_steps, config.optimizer.clip_norm = 2, 0.0
    own = {tmp_path / str(rate): varied(config, 0, rate, 1.0) for rate in (1e-2, 1e30)}
    train_directories(own)
    losses = [progress.progress(workdir, config).losses[-1] for workdir in own]
    assert losses[0] < 4.0
    assert np.isnan(losses[1])
