"""Training end to end: it learns, it stops and goes on exactly, it survives damage."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrgpt_jax import evaluate, optimizers, runs, sample, sharding, train, training
from nrgpt_jax.checkpoints import Checkpoints
from nrgpt_jax.configs import default_config
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation import Sampling
from nrgpt_jax.input_pipeline import Batch
from nrgpt_jax.metrics import read_metrics
from nrgpt_jax.models import create_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

TEXT = "the tokens roll down the hill, and the hill rolls down the tokens. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(corpus):
    c = default_config()
    c.update({"train_steps": 12, "log_every": 3, "eval_every": 6, "eval_windows": 4})
    c.update({"checkpoint_every": 4})
    c.model.update({"context_length": 16, "embed_dim": 16, "num_steps": 2, "dropout": 0.1})
    c.data.update({"name": "text", "path": str(corpus), "batch_size": 8})
    c.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 2})
    return c


def values(workdir):
    """metrics.jsonl without what a clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def test_learns_and_leaves_a_complete_run_directory(config, tmp_path):
    config.train_steps = 60
    workdir = tmp_path / "run"
    last = train.train(config, workdir)
    losses = [r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    assert last["val/loss"] < 0.8 * losses[0]
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    found = evaluate.evaluate(workdir)
    assert found["val/loss"] == pytest.approx(last["val/loss"], rel=0.2)
    texts = sample.sample(
        workdir, "the ", sampling=Sampling(0.8), max_new_tokens=20, num_samples=2, seed=1
    )
    assert [len(t) for t in texts] == [24, 24]
    assert all(t.startswith("the ") for t in texts)


def stop_at(monkeypatch, step):
    """Sends Ctrl-C to this process when a step's metrics are taken."""
    after = train._StepLog.after

    def after_and_stop(log, at, metrics):
        after(log, at, metrics)
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train._StepLog, "after", after_and_stop)


@pytest.mark.parametrize("step", [3, 5, 6])
def test_stopped_and_continued_equals_left_alone(config, tmp_path, monkeypatch, capfd, step):
    train.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        train.train(config, tmp_path / "parts")
    assert f"stopped at step {step} and saved" in capfd.readouterr().err
    assert max(r["step"] for r in values(tmp_path / "parts")) <= step
    train.train(config, tmp_path / "parts")
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    assert f"going on from step {step}" in capfd.readouterr().err


def test_killed_between_checkpoints_repeats_the_lost_steps(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config.checkpoint_every = 4
    train.train(config, whole)
    config.train_steps = 12
    shutil.copytree(whole, parts)
    # As if killed after step 11: the last state is that of step 8, a line is cut short.
    shutil.rmtree(parts / "checkpoints/latest/12")
    lines = (parts / "metrics.jsonl").read_text().splitlines()
    (parts / "metrics.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-1][:20])
    train.train(config, parts)
    assert values(parts) == values(whole)


def truncate(folder: Path):
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])


def test_a_damaged_checkpoint_is_skipped_and_two_are_an_error(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(config, whole)
    shutil.copytree(whole, parts)
    truncate(parts / "checkpoints/latest/12")
    train.train(config, parts)
    assert values(parts) == values(whole)
    for step in (8, 12):
        truncate(parts / f"checkpoints/latest/{step}")
    before = (parts / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="no readable latest checkpoint"):
        train.train(config, parts)
    assert (parts / "metrics.jsonl").read_text() == before, "nothing is overwritten"


def test_best_checkpoint_has_the_lowest_loss(config, tmp_path):
    config.eval_every = 2
    train.train(config, tmp_path)
    losses = {r["step"]: r["val/loss"] for r in values(tmp_path) if "val/loss" in r}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_loss() == min(losses.values())


def test_another_model_is_refused_by_name(config, tmp_path):
    config.train_steps = 2
    train.train(config, tmp_path)
    config.model.embed_dim = 32
    with pytest.raises(UserError) as error:
        train.train(config, tmp_path)
    for part in ("model.embed_dim=16 there, 32 here", "attention_params/J: (1, 16, 16) there"):
        assert part in str(error.value)
    config.model.embed_dim = 16
    config.optimizer.learning_rate = 1e-3
    config.train_steps = 3
    train.train(config, tmp_path)  # the rest may change
    assert runs.load_config(tmp_path).optimizer.learning_rate == 1e-3


def test_divergence_ends_in_one_line_before_it_is_saved(config, tmp_path):
    config.optimizer.update({"learning_rate": 1e30, "clip_norm": 0.0, "warmup_steps": 0})
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step"):
        train.train(config, tmp_path)


def test_accumulation_is_the_whole_batch(config):
    config.model.update({"vocab_size": 30, "dropout": 0.0})
    mesh, model = sharding.make_mesh(), create_model(config)
    optimizer = optimizers.create_optimizer(config.optimizer, 10)
    tokens = np.arange(8 * 17).reshape(8, 17) % 30
    weights = (np.arange(8 * 16).reshape(8, 16) % 5 > 0).astype(np.float32)
    batch = sharding.put_batch(Batch(tokens[:, :-1], tokens[:, 1:], weights), mesh)
    results = []
    for parts in (1, 4):
        step = training.make_train_step(model, optimizer, 0, parts, mesh)
        state, metrics = step(training.create_state(model, optimizer, 0, mesh), batch)
        results.append((float(metrics["train/loss"]), state.params))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), results[0][1], results[1][1])
    # One Adam step moves every entry by about the learning rate; equal gradients, equal moves.
    assert max(map(float, jax.tree.leaves(difference))) < 0.05 * 1e-2


def test_batches_are_split_over_devices_and_states_repeated(config):
    assert jax.device_count() == 2
    config.model.vocab_size = 30
    mesh, model = sharding.make_mesh(), create_model(config)
    optimizer = optimizers.create_optimizer(config.optimizer, 10)
    state = training.create_state(model, optimizer, 0, mesh)
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(state.params))
    tokens = np.zeros((8, 16), np.int32)
    batch = sharding.put_batch(Batch(tokens, tokens, np.ones((8, 16), np.float32)), mesh)
    assert {s.data.shape for s in batch.inputs.addressable_shards} == {(4, 16)}
    step = training.make_train_step(model, optimizer, 0, 1, mesh)
    for _ in range(3):
        state, _ = step(state, batch)
    assert cast(Any, step)._cache_size() == 1, "later steps compile nothing"
    assert int(state.step) == 3


def test_vocabulary_may_be_padded_but_not_cut(config, tmp_path):
    config.train_steps = 1
    config.model.vocab_size = 5
    with pytest.raises(UserError, match=r"model\.vocab_size=5 is too small"):
        train.train(config, tmp_path / "a")
    config.model.vocab_size = 64
    train.train(config, tmp_path / "b")
    assert runs.load_config(tmp_path / "b").model.vocab_size == 64


def test_missing_runs_and_checkpoints(tmp_path, config):
    with pytest.raises(UserError, match="is not a run directory"):
        evaluate.evaluate(tmp_path)
    config.train_steps = 1
    train.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/best")
    with pytest.raises(UserError, match="no best checkpoint"):
        evaluate.evaluate(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.evaluate(tmp_path)


def test_sampling_mistakes(tmp_path):
    for sampling, name in [(Sampling(-1.0), "temperature"), (Sampling(1.0, top_p=0.0), "top_p")]:
        with pytest.raises(UserError, match=name):
            sample.sample(tmp_path, "x", sampling=sampling)
