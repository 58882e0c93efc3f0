"""Training end to end: it learns, it stops and goes on exactly, it survives damage."""

import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from train_helpers import TEXT, config_of, stop_at, values

from nrgpt_jax import evaluate, sample
from nrgpt_jax.array_types import Batch
from nrgpt_jax.errors import STOPPED, UserError
from nrgpt_jax.generation.generate import Settings
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.runs import directory as runs
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.runs.pretrained import read_params
from nrgpt_jax.training import evaluation, loop, optimizers
from nrgpt_jax.training import step as training

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(corpus):
    return config_of(corpus)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run of the configuration that was left alone."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loop.train(config_of(corpus), workdir)
    return workdir


@pytest.fixture
def parts(whole, tmp_path):
    """A copy of it, to be damaged and gone on with."""
    return shutil.copytree(whole, tmp_path / "parts")


def test_learns_and_leaves_a_complete_run_directory(config, tmp_path):
    config.train_steps = 60
    workdir = tmp_path / "run"
    last = loop.train(config, workdir)
    losses = [r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    timed = [r for r in read_metrics(workdir) if "tokens_per_second" in r]
    assert [r["step"] for r in timed] == list(range(3, 61, 3)), "all lines but the first"
    assert all(0 < r["mfu"] < 1 and 0 <= r["input_wait"] < 1 for r in timed)
    assert last["val/loss"] < 0.8 * losses[0]
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    found = evaluate.evaluate(workdir)
    assert found["val/loss"] == pytest.approx(last["val/loss"], rel=0.2)
    drawn = Settings(Sampling(temperature=0.8))
    texts = sample.sample(workdir, "the ", drawn, max_new_tokens=20, num_samples=2, seed=1)
    assert [len(t) for t in texts] == [24, 24]
    assert all(t.startswith("the ") for t in texts)


@pytest.mark.long
@pytest.mark.parametrize("step", [3, *(slow(step) for step in (5, 6))])
def test_stopped_and_continued_equals_left_alone(config, whole, tmp_path, monkeypatch, capfd, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(SystemExit, match="130"):
            loop.train(config, tmp_path / "parts")
    assert f"stopped at step {step} and saved" in capfd.readouterr().err
    assert max(r["step"] for r in values(tmp_path / "parts")) <= step
    loop.train(config, tmp_path / "parts")
    assert values(tmp_path / "parts") == values(whole)
    assert f"resuming from step {step}" in capfd.readouterr().err


def test_terminated_is_saved_and_told_by_the_exit_code(config, tmp_path, monkeypatch, capfd):
    """By it SLURM and Kubernetes know that there is more to do."""
    stop_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        loop.train(config, tmp_path / "run")
    assert ended.value.code == STOPPED == 143
    assert "stopped at step 3 and saved" in capfd.readouterr().err
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.has("latest")


@pytest.mark.ci
def test_killed_between_checkpoints_repeats_the_lost_steps(config, whole, parts):
    # As if killed after step 11: the last state is that of step 8, a line is cut short.
    shutil.rmtree(parts / "checkpoints/latest/12")
    lines = (parts / "metrics.jsonl").read_text().splitlines()
    (parts / "metrics.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-1][:20])
    loop.train(config, parts)
    assert values(parts) == values(whole)


def test_a_damaged_checkpoint_is_skipped_and_two_are_an_error(config, whole, parts):
    truncate(parts / "checkpoints/latest/12")
    loop.train(config, parts)
    assert values(parts) == values(whole)
    shutil.rmtree(parts / "checkpoints/latest/8")
    loop.train(config, parts)  # the damaged one was replaced: there is something to read
    shutil.copytree(whole / "checkpoints/latest/8", parts / "checkpoints/latest/8")
    for step in (8, 12):
        truncate(parts / f"checkpoints/latest/{step}")
    before = (parts / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="no readable latest checkpoint"):
        loop.train(config, parts)
    assert (parts / "metrics.jsonl").read_text() == before, "nothing is overwritten"


def truncate(folder: Path):
    for file in folder.rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])


def saved(workdir, kind):
    """Step and parameters of a checkpoint."""
    return read_params(workdir, kind, create_model(runs.load_config(workdir)))


def test_best_checkpoint_has_the_lowest_loss(config, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(evaluation, "evaluate_loss", lambda *args: {"val/loss": next(losses)})
    config.eval_every = 4
    loop.train(config, tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_loss() == 1.0
    (best_step, best), (latest_step, latest) = saved(tmp_path, "best"), saved(tmp_path, "latest")
    assert (best_step, latest_step) == (8, 12)
    assert not np.array_equal(best["head"]["kernel"], latest["head"]["kernel"])


def test_another_model_is_refused_by_name(config, parts):
    config.model.embed_dim = 32
    with pytest.raises(UserError) as error:
        loop.train(config, parts)
    for part in ("model.embed_dim=16 there, 32 here", "block/attention/J: (1, 16, 16) there"):
        assert part in str(error.value)
    config.model.embed_dim = 16
    config.log_every = 1
    shutil.rmtree(parts / "checkpoints/latest/12")
    loop.train(config, parts)  # the rest may change
    assert runs.load_config(parts).log_every == 1


def test_two_processes_do_not_share_a_run(config, tmp_path):
    with runs.locked(tmp_path), pytest.raises(UserError, match="another process is training"):
        loop.train(config, tmp_path)


def test_an_edited_corpus_is_noticed(config, corpus, parts, tmp_path):
    moved = tmp_path / "moved.txt"
    moved.write_text(corpus.read_text())
    config.data.path = str(moved)
    shutil.rmtree(parts / "checkpoints/latest/12")
    loop.train(config, parts)  # where it lies does not matter
    moved.write_text(corpus.read_text()[::-1])
    config.train_steps = 13
    with pytest.raises(UserError, match=r"data\.fingerprint"):
        loop.train(config, parts)
    with pytest.raises(UserError, match="no longer the one"):
        evaluate.evaluate(parts)


def test_loss_is_the_weighted_mean_in_any_number_of_parts(config):
    config.model.update({"vocab_size": 30, "dropout": 0.0})
    mesh, model = sharding.make_mesh(), create_model(config)
    optimizer = optimizers.create_optimizer(config.optimizer, 10, parameter_specs(model))
    tokens = np.arange(8 * 17).reshape(8, 17) % 30
    weights = (np.arange(8 * 16).reshape(8, 16) % 5 > 0).astype(np.float32)
    batch = sharding.put_batch(Batch(tokens[:, :-1], tokens[:, 1:], weights), mesh)
    start = training.create_state(model, optimizer, 0, mesh)
    params = jax.tree.map(np.asarray, start.params)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_token = -np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    expected = (by_token * weights).sum() / weights.sum()
    results, norms = [], []
    for parts in (1, 4):
        step = training.make_train_step(model, optimizer, 0, parts, mesh)
        state, metrics = step(jax.tree.map(jnp.copy, start), batch)  # it is given away
        results.append((float(metrics["train/loss"]), state.params))
        norms.append(float(metrics["train/grad_norm"]))
    assert [loss for loss, _ in results] == pytest.approx([expected, expected], rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), results[0][1], results[1][1])
    # One Adam step moves every entry by about the learning rate; equal gradients, equal moves.
    assert max(map(float, jax.tree.leaves(difference))) < 0.05 * 1e-2


def test_vocabulary_may_be_padded_but_not_cut(config):
    config.model.vocab_size = 5
    with pytest.raises(UserError, match=r"model\.vocab_size=5 is too small"):
        loop.resolve(config)
    config.model.vocab_size = 64
    loop.resolve(config)
    assert config.model.vocab_size == 64


def test_missing_runs_and_checkpoints(tmp_path, parts):
    with pytest.raises(UserError, match="is not a run directory"):
        evaluate.evaluate(tmp_path)
    shutil.rmtree(parts / "checkpoints/best")
    with pytest.raises(UserError, match="no best checkpoint"):
        evaluate.evaluate(parts)
    (parts / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.evaluate(parts)
