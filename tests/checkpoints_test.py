"""Checkpoints: what is damaged is never used in silence, and what is needed is never removed."""

import asyncio
import json
import math
import random
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from nrgpt_jax import disk
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs import checkpoints as module
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.orbax_errors import failure
from nrgpt_jax.training.step import TrainState

PLACE = {"next_sample": 8, "evaluation_due": True}


def state_at(step: int, value: float = 0.5) -> Any:
    params = {"w": jnp.full((3, 2), value + step), "b": jnp.arange(2.0)}
    optimizer = (jnp.full((3, 2), 0.1 * step), jnp.array(step))
    return TrainState(jnp.array(step), params, optimizer, None, None)


def shapes():
    of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(of, state_at(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Latest checkpoints of steps 4 and 8, best ones of 3 (loss 2) and 7 (loss 1)."""
    workdir = tmp_path_factory.mktemp("made")
    with Checkpoints(workdir, writable=True) as checkpoints:
        for step in (3, 4, 7, 8):
            if step % 2:
                checkpoints.save_best(step, state_at(step).params, 2.0 if step == 3 else 1.0)
            else:
                checkpoints.save_latest(step, state_at(step), PLACE)
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def latest_step(workdir):
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore_latest(shapes())
    assert found is not None
    state, place = found
    step = int(state.step)
    np.testing.assert_array_equal(state.params["w"], state_at(step).params["w"])
    np.testing.assert_array_equal(state.optimizer[0], state_at(step).optimizer[0])
    assert place == PLACE
    return step


def test_what_is_saved_comes_back(workdir):
    assert latest_step(workdir) == 8
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.best_loss() == 1.0
        step, params = checkpoints.restore_params("best", shapes().params)
    assert step == 7
    np.testing.assert_array_equal(params["w"], state_at(7).params["w"])


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda path: flip(path, random.Random(0)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", slow_but(["latest"], ["latest", "best"]))
def test_damage_to_any_file_is_noticed(made, tmp_path, caplog, damage, kind):
    newest = made / f"checkpoints/{kind}/{8 if kind == 'latest' else 7}"
    whole = [p for p in files_of(newest) if p.stat().st_size or damage == "deleted"]
    files = [p.relative_to(made) for p in whole]
    assert len(files) >= 10
    for number, file in enumerate(files):
        workdir = shutil.copytree(made, tmp_path / str(number))
        DAMAGES[damage](workdir / file)
        caplog.clear()
        with Checkpoints(workdir) as checkpoints:
            if kind == "latest":
                step = latest_step(workdir)
            else:
                checkpoints.best_loss()
                assert caplog.text, "training says so too"
                step, params = checkpoints.restore_params("best", shapes().params)
                np.testing.assert_array_equal(params["w"], state_at(step).params["w"])
                assert checkpoints.best_loss() == (1.0 if step == 7 else 2.0)
        unverified = file.name == "checksums.json" and damage == "deleted"
        assert step == ({"latest": 8, "best": 7} if unverified else {"latest": 4, "best": 3})[kind]
        said = "has no checksums" if unverified else "is not used"
        assert said in caplog.text, file


def test_without_a_whole_one_a_line_says_so(workdir):
    for file in files_of(workdir / "checkpoints/latest"):
        if file.parent.name == "d":
            flip(file, random.Random(1))
    with pytest.raises(UserError, match=r"no readable latest .* use --checkpoint=best"):
        Checkpoints(workdir).restore_latest(shapes())


def test_a_name_in_the_checksums_cannot_lead_out_of_the_folder(workdir, caplog):
    file = workdir / "checkpoints/latest/8/checksums.json"
    sums = json.loads(file.read_text())["xxh3_128"]
    outside = workdir / "outside"
    outside.write_text("x")
    disk.write_json(file, {"xxh3_128": {**sums, "../../../outside": disk.file_checksum(outside)}})
    assert latest_step(workdir) == 4
    assert "../../../outside' is missing" in caplog.text


@pytest.mark.parametrize("where", ["params", "optimizer"])
def test_numbers_that_are_not_finite_are_not_read(workdir, caplog, where):
    state = state_at(9)
    if where == "params":
        state = state.replace(params={**state.params, "b": jnp.array([0.0, jnp.nan])})
    else:
        state = state.replace(optimizer=(state.optimizer[0] + jnp.inf, state.optimizer[1]))
    with Checkpoints(workdir, writable=True, keep=3) as checkpoints:
        checkpoints.save_latest(9, state, PLACE)
        checkpoints.save_best(9, state_at(9).params | {"b": jnp.full(2, jnp.nan)}, 0.5)
    assert latest_step(workdir) == 8
    assert "not finite" in caplog.text
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore_params("best", shapes().params)[0] == 7


def test_a_save_that_fails_says_so_and_leaves_the_others(workdir, monkeypatch):
    begun = workdir / "checkpoints/latest/12.partial.orbax-checkpoint-tmp"

    def full(*args, **kwargs):
        begun.mkdir()
        raise ValueError("INTERNAL: write failed: No space left on device [errno=28]")

    monkeypatch.setattr(module.ocp, "save_checkpointables", full)
    with Checkpoints(workdir, writable=True) as checkpoints:
        with pytest.raises(OSError, match=r"step 12 cannot be saved .*No space left on device"):
            checkpoints.save_latest(12, state_at(12), PLACE)
        assert checkpoints.steps("latest") == [4, 8]
    assert not begun.exists(), "the disk has room again"
    assert latest_step(workdir) == 8


def test_a_save_that_was_killed_counts_for_nothing(workdir, monkeypatch):
    monkeypatch.setattr(module, "_move", lambda *paths: None)  # as if killed before
    with Checkpoints(workdir, writable=True) as checkpoints:
        checkpoints.save_latest(12, state_at(12), PLACE)
    assert (workdir / "checkpoints/latest/12.partial").exists()
    assert latest_step(workdir) == 8
    Checkpoints(workdir, writable=True)
    assert latest_step(workdir) == 8
    assert not (workdir / "checkpoints/latest/12.partial").exists()


def test_retention_keeps_the_last_ones_every_kth_and_what_was_best_up_to_each(tmp_path):
    with Checkpoints(tmp_path, writable=True, keep=2, keep_every=6) as checkpoints:
        for step in range(1, 11):
            if step in (1, 2, 5, 7, 10):
                checkpoints.save_best(step, state_at(step).params, 1.0 / step)
            checkpoints.save_latest(step, state_at(step), PLACE)
        assert checkpoints.steps("latest") == [6, 9, 10]
        assert checkpoints.steps("best") == [5, 7, 10], "of steps 6, 9 and 10"
        checkpoints.drop_best_after(9)
        assert checkpoints.best_loss() == 1.0 / 7
        moved = checkpoints.set_aside(9, tmp_path / "aside")
        assert [path.name for path in moved] == ["checkpoint_9", "checkpoint_10"]
        assert checkpoints.steps("latest") == [6]
        assert all((path / "checksums.json").exists() for path in moved)


def test_damaged_states_of_later_steps_take_no_place_of_those_that_are_saved(workdir):
    flip(workdir / "checkpoints/latest/8/checksums.json", random.Random(3))
    with Checkpoints(workdir, writable=True) as checkpoints:
        for step in (5, 6):
            checkpoints.save_latest(step, state_at(step), PLACE)
        assert checkpoints.whole_steps("latest") == [5, 6]
    assert latest_step(workdir) == 6


def test_a_checkpoint_that_was_to_give_way_comes_back_after_a_kill(workdir):
    folder = workdir / "checkpoints/latest"
    (folder / "8").rename(folder / "8.replaced")  # as if killed before the other one came
    shutil.copytree(folder / "4", folder / "8.partial")
    Checkpoints(workdir, writable=True)
    assert latest_step(workdir) == 8
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_a_damaged_checkpoint_of_the_same_step_gives_way(workdir):
    flip(workdir / "checkpoints/latest/8/checksums.json", random.Random(2))
    with Checkpoints(workdir, writable=True) as checkpoints:
        checkpoints.save_latest(8, state_at(8), PLACE)
    assert latest_step(workdir) == 8


def test_loss_of_an_older_best_checkpoint(workdir, caplog):
    """They kept it in a file of its own, and had no checksums."""
    folder = workdir / "checkpoints/best/7"
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({**metadata, "custom_metadata": {}}))
    (folder / "checksums.json").unlink()
    (folder / "metrics").mkdir()
    (folder / "metrics/metrics").write_text('{"val/loss": 1.25}')
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.best_loss() == 1.25
    (folder / "metrics/metrics").write_text('{"val/loss": 1.2')
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.best_loss() == math.inf
        assert checkpoints.restore_params("best", shapes().params)[0] == 7
    assert "its loss is not known" in caplog.text


def test_callbacks_that_fail_in_threads_of_a_failed_save_print_nothing(caplog):
    def call():
        raise OSError(28, "No space left on device")

    assert failure(call) == "No space left on device"
    late: Future[None] = Future()
    late.add_done_callback(lambda _: asyncio.get_running_loop())
    late.set_result(None)
    assert not caplog.records
