"""Cost of checksums: seconds to save and open a state of a hundred million parameters."""

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from nrgpt_jax.runs import checksums
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.training.step import TrainState
from studies.reliability.report import Part

ARRAYS, SHAPE = 10, (2_500, 4_000)  # a hundred million parameters


def run(cases: int, seed: int, jobs: int) -> dict[str, Any]:
    """Cost of checksums.

    Medians for a state of 1.2 GB (a hundred million parameters with AdamW's moments). For saving,
    the time spent on checksums is measured; opening is measured with and without verification.
    Verified files are read twice, the second time from memory.
    """
    del jobs
    state, seconds = random_state(seed), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as name:
        for turn in range(cases + 1):
            for what, spent in _round(Path(name) / str(turn), state):
                seconds.setdefault(what, []).extend([spent] * bool(turn))
    median = {what: statistics.median(values) for what, values in seconds.items()}
    median["saving, without"] = median["saving, with"] - median["checksums of it"]
    rows = {}
    for what in ("saving", "opening from memory", "opening from disk"):
        without, with_sums = median[f"{what}, without"], median[f"{what}, with"]
        rows[what] = {
            "seconds without checksums": f"{without:.2f}",
            "with": f"{with_sums:.2f}",
            "difference": f"{with_sums / without - 1:+.1%}",
        }
    return {"rows": rows, "wrong": [], "seconds": seconds}


@jax.jit
def random_state(seed: int) -> TrainState:
    """Return a state of random parameters and AdamW moments."""
    zero, names = jnp.zeros((), jnp.int32), [f"matrix{n}" for n in range(ARRAYS)]
    keys = jax.random.split(jax.random.key(seed), (3, ARRAYS))
    draw = lambda row: {n: jax.random.normal(k, SHAPE) for n, k in zip(names, row, strict=True)}
    params, mean, variance = map(draw, keys)
    return TrainState(zero, params, optax.ScaleByAdamState(zero, mean, variance), zero, zero)


def _round(workdir: Path, state: TrainState) -> Iterator[tuple[str, float]]:
    """Yield the seconds of a save and of its checksums, then of opening it from memory and from
    disk, without and with verification."""
    shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    shapes = jax.tree.map(shape_of, state)
    unverified = lambda: mock.patch.object(checksums, "damage", return_value="")
    spent, write = [], checksums.write
    measured = lambda folder: spent.append(_timed(lambda: write(folder)))

    def opened() -> None:
        jax.block_until_ready(Checkpoints(workdir).restore_latest(shapes))

    checkpoints = Checkpoints(workdir, writable=True)
    with mock.patch.object(checksums, "write", measured):
        yield "saving, with", _timed(lambda: checkpoints.save_latest(1, state, {}))
    yield "checksums of it", sum(spent)
    for where, prepare in (("memory", opened), ("disk", lambda: _forget(workdir))):
        for how, verifying in (("without", unverified), ("with", contextlib.nullcontext)):
            prepare()
            with verifying():
                yield f"opening from {where}, {how}", _timed(opened)
    shutil.rmtree(workdir)


def _forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that they are read from disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


PART = Part("", 7, run)
