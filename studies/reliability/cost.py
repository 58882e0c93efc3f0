"""What checksums cost: seconds of saving and of opening a state of a hundred million parameters."""

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
from studies.tables import table

TITLE, CASES = "What checksums cost", 7  # rounds
ARRAYS, ROWS, COLUMNS = 10, 2_500, 4_000  # a hundred million parameters


def run(cases: int = CASES, seed: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Times saving and opening, in so many rounds after one that does not count."""
    del jobs
    state = made_up(seed)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(cases + 1):
            for what, spent in _round(Path(name) / str(turn), state):
                if turn:
                    seconds.setdefault(what, []).append(spent)
    return {
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "rounds": cases,
        "seconds": seconds,
    }


def made_up(seed: int) -> TrainState:
    """Random parameters, and AdamW's moments."""

    def init() -> TrainState:
        keys = jax.random.split(jax.random.key(seed), 3 * ARRAYS)
        draw = lambda key: jax.random.normal(key, (ROWS, COLUMNS))
        params, mean, square = (
            {f"matrix{n}": draw(keys[start + n]) for n in range(ARRAYS)}
            for start in (0, ARRAYS, 2 * ARRAYS)
        )
        zero = jnp.zeros((), jnp.int32)
        moments = optax.ScaleByAdamState(zero, mean, jax.tree.map(jnp.square, square))
        return TrainState(zero, params, moments, zero, zero)

    return jax.block_until_ready(jax.jit(init)())


def _round(workdir: Path, state: TrainState) -> Iterator[tuple[str, float]]:
    """Seconds of a save and of its checksums; of opening it from memory and from the disk, with and
    without verifying."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )

    def opened() -> None:
        with Checkpoints(workdir) as checkpoints:
            jax.block_until_ready(checkpoints.restore_latest(shapes))

    with Checkpoints(workdir, writable=True) as checkpoints, _measured("write") as spent:
        yield "saving", _timed(lambda: checkpoints.save_latest(1, state, {}))
    yield "checksums of it", spent[0]
    for where, prepare in (("memory", opened), ("disk", lambda: _forget(workdir))):
        for how, verifying in (("without", _unverified), ("with", contextlib.nullcontext)):
            prepare()
            with verifying():
                yield f"opening from {where}, {how}", _timed(opened)
    shutil.rmtree(workdir)


@contextlib.contextmanager
def _measured(name: str) -> Iterator[list[float]]:
    """Seconds spent in a function of `checksums`."""
    spent, function = [0.0], getattr(checksums, name)

    def measured(folder: Path) -> Any:
        begin = time.perf_counter()
        try:
            return function(folder)
        finally:
            spent[0] += time.perf_counter() - begin

    with mock.patch.object(checksums, name, measured):
        yield spent


def _unverified() -> contextlib.AbstractContextManager:
    """Checksums are not looked at."""
    return mock.patch.object(checksums, "damage", return_value="")


def _forget(folder: Path) -> None:
    """Makes the system read the files of a folder from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    median = {what: statistics.median(values) for what, values in found["seconds"].items()}
    sums = median["checksums of it"]
    rows = [_row("saving", median["saving"] - sums, median["saving"])]
    for where in ("memory", "disk"):
        what = f"opening from {where}"
        rows.append(_row(what, median[f"{what}, without"], median[f"{what}, with"]))
    return [
        f"A state of {found['bytes'] / 1e9:.1f} GB (a hundred million parameters with AdamW's "
        f"moments), {found['rounds']} rounds, medians. Of saving, the seconds that are spent on "
        "checksums are measured; opening is measured with and without verifying. What is verified "
        "is read twice, the second time from memory.",
        "",
        *table(["", "seconds without checksums", "with", "difference"], rows),
    ]


def _row(what: str, without: float, with_sums: float) -> list[str]:
    share = (with_sums - without) / without
    return [what, f"{without:.2f}", f"{with_sums:.2f}", f"{share:+.1%}"]
