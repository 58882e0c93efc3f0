"""Every file of every checkpoint, damaged in every way: what is read is right, or it is refused.

Each file of the newest latest checkpoint and of the best one, of a run of one process and of two,
is cut to half, emptied, filled with zeros, deleted, and has one bit turned over at random places.
Then the run directory is opened by the library itself: as training goes on with it, and as
sampling reads its parameters.
"""

import collections
import contextlib
import io
import itertools
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import load_config
from nrgpt_jax.runs.pretrained import read_params
from nrgpt_jax.training import optimizers
from nrgpt_jax.training import step as steps
from studies.reliability import judge
from studies.reliability.judge import SHORT
from studies.reliability.tiny import undisturbed
from studies.tables import table

TITLE, CASES = "Damaged checkpoints", 40  # bits turned over in each file

FALL_BACK = "an older checkpoint, with a warning"
ONE_LINE = "one line of error"
WHOLE = "the right values, with a warning"
SILENT = "the right values, and nothing said"
WRONG = "wrong values"
UNSAID = "an older checkpoint, and nothing said"
TRACEBACK = "a traceback"
OUTCOMES = (FALL_BACK, ONE_LINE, WHOLE, SILENT, UNSAID, WRONG, TRACEBACK)

Damage = Callable[[bytes, np.random.Generator], bytes | None]
DAMAGES: dict[str, Damage] = {
    "cut to half": lambda content, random: content[: len(content) // 2],
    "emptied": lambda content, random: b"",
    "zeros": lambda content, random: bytes(len(content)),
    "deleted": lambda content, random: None,
    "one bit": lambda content, random: _turned(content, int(random.integers(8 * len(content)))),
}


def _turned(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Opened(NamedTuple):
    """What a reader has made of a run directory."""

    step: int
    values: dict[str, Any]  # arrays and other values, by name


Reader = Callable[[Path], Opened]


def run(cases: int = CASES, seed: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Damages every file, with so many turned bits each. Returns counts of outcomes."""
    del jobs  # a process reads one checkpoint at a time
    counts: collections.Counter = collections.Counter()
    wrong: list[dict[str, Any]] = []
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        for processes in (1, 2):
            workdir = undisturbed(Path(name), processes).workdir
            for kind, alone in itertools.product(judge.KINDS, (False, True)):
                where = f"{kind}, {processes} process{'es' if processes > 1 else ''}"
                where += ", the only one" if alone else ""
                bits = 1 if alone else cases
                for case, reader, outcome, text in outcomes(workdir, kind, bits, random, alone):
                    counts[where, reader, case.how, outcome] += 1
                    if outcome in (WRONG, UNSAID, TRACEBACK):
                        wrong.append({"file": f"{where}: {case.file}", "how": case.how})
                        wrong[-1] |= {"reader": reader, "outcome": outcome, "said": text[:SHORT]}
    return {
        "cases": sum(counts.values()),
        "outcomes": [[*key, count] for key, count in sorted(counts.items())],
        "wrong": wrong,
    }


class Case(NamedTuple):
    """A damaged file."""

    file: str  # in the folder of the checkpoint
    how: str
    content: bytes | None


def damages(folder: Path, bits: int, random: np.random.Generator) -> Iterator[Case]:
    """All damages of all files of a checkpoint that change something."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for how, damage in DAMAGES.items():
            for _ in range(bits if how == "one bit" and content else 1):
                changed = damage(content, random) if content or how == "deleted" else content
                if changed != content:
                    yield Case(str(path.relative_to(folder)), how, changed)


def outcomes(
    workdir: Path, kind: str, bits: int, random: np.random.Generator, alone: bool = False
) -> Iterator[tuple[Case, str, str, str]]:
    """(case, reader, outcome, message) of every case and reader of the newest checkpoint, with or
    without older ones beside it."""
    readers = readers_of(workdir, kind)
    wanted = {name: _by_step(workdir, kind, reader) for name, reader in readers.items()}
    if alone:
        workdir = _without_older(workdir, kind)
        wanted = {name: {max(found): found[max(found)]} for name, found in wanted.items()}
        if kind == "best":  # there is no loss to beat then
            wanted["training"][-1] = Opened(-1, {"val/loss": math.inf})
    newest = judge.steps_saved(workdir, kind)[-1]
    folder = Path("checkpoints") / kind / str(newest)
    for case in damages(workdir / folder, bits, random):
        for name, reader in readers.items():
            with damaged_copy(workdir, folder / case.file, case.content) as copy:
                outcome, text = judged(reader, copy, wanted[name], f"{kind}/{newest}")
            yield case, name, outcome, text


def _without_older(workdir: Path, kind: str) -> Path:
    """A copy with the newest checkpoint of this kind only."""
    copy = workdir.with_name(f"{workdir.name}_{kind}_alone")
    shutil.copytree(workdir, copy, copy_function=os.link)
    for step in judge.steps_saved(copy, kind)[:-1]:
        shutil.rmtree(copy / "checkpoints" / kind / str(step))
    return copy


@contextlib.contextmanager
def damaged_copy(workdir: Path, file: Path, content: bytes | None) -> Iterator[Path]:
    """A run directory in which one file has another content (None: it is gone)."""
    with tempfile.TemporaryDirectory(dir=workdir.parent) as name:
        copy = Path(name) / "run"
        skipped = shutil.ignore_patterns("cache", "tensorboard")
        shutil.copytree(workdir, copy, ignore=skipped, copy_function=os.link)
        (copy / file).unlink()
        if content is not None:
            (copy / file).write_bytes(content)
        yield copy


# Opening ------------------------------------------------------------------------------------------


def readers_of(workdir: Path, kind: str) -> dict[str, Reader]:
    """The ways in which a checkpoint of this kind is opened."""
    config = load_config(workdir)
    model, mesh = create_model(config), sharding.make_mesh()

    def parameters(copy: Path) -> Opened:
        step, params = read_params(copy, kind, model)
        return Opened(step, _named(params))

    optimizer = optimizers.create_optimizer(
        config.optimizer, config.train_steps, parameter_specs(model)
    )
    shapes = steps.abstract_state(model, optimizer, mesh)

    def whole_state(copy: Path) -> Opened:
        with Checkpoints(copy, writable=True) as checkpoints:
            found = checkpoints.restore_latest(shapes)
        assert found is not None, "a run that has checkpoints would begin anew"
        state, place = found
        return Opened(int(state.step), {**_named(state), "place": dict(place)})

    losses = {r["val/loss"]: r["step"] for r in judge.read_records(workdir) if "val/loss" in r}

    def loss_to_beat(copy: Path) -> Opened:
        with Checkpoints(copy, writable=True) as checkpoints:
            loss = checkpoints.best_loss()
        return Opened(losses.get(loss, -1), {"val/loss": loss})

    going_on = whole_state if kind == "latest" else loss_to_beat
    return {"training": going_on, "sampling": parameters}


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _by_step(workdir: Path, kind: str, reader: Reader) -> dict[int, Opened]:
    """What a reader should find: of the whole run, and with only its older checkpoints."""
    found = {}
    for step in judge.steps_saved(workdir, kind):
        with damaged_copy(workdir, Path("tokenizer.json"), None) as copy:
            for other in judge.steps_saved(copy, kind):
                if other != step:
                    shutil.rmtree(copy / "checkpoints" / kind / str(other))
            opened = reader(copy)
            found[opened.step] = opened
    return found


# Judging ------------------------------------------------------------------------------------------


def judged(reader: Reader, copy: Path, wanted: dict[int, Opened], name: str) -> tuple[str, str]:
    """(outcome, what was said).

    Args:
      reader: opens the damaged run.
      copy: that run.
      wanted: what is right, by step.
      name: of the damaged checkpoint, which a warning must name.
    """
    with heard() as said:
        try:
            opened = reader(copy)
        except UserError as error:
            one_line = "\n" not in str(error) and str(error)
            return (ONE_LINE if one_line else TRACEBACK), str(error)
        except Exception as error:
            return TRACEBACK, f"{type(error).__name__}: {error}"[:SHORT]
    text = said.getvalue()
    warned = name in text
    if not (opened.step in wanted and same_values(wanted[opened.step], opened)):
        return WRONG, text
    if opened.step != max(wanted):
        return (FALL_BACK if warned else UNSAID), text
    return (WHOLE if warned else SILENT), text


def same_values(one: Opened, other: Opened) -> bool:
    """Whether the same was read, bit by bit."""
    if one.values.keys() != other.values.keys():
        return False
    pairs = [(one.values[name], other.values[name]) for name in one.values]
    return all(judge.same_bits(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """Warnings, however they are given."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    loggers = [logging.getLogger(), logging.getLogger("absl")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("always")
            yield said
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


# The page -----------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    counts: collections.Counter = collections.Counter()
    for where, reader, _, outcome, count in found["outcomes"]:
        counts[where, reader, outcome] += count
    rows = [
        [where, reader, *(counts[where, reader, outcome] for outcome in OUTCOMES)]
        for where, reader in dict.fromkeys((w, r) for w, r, *_ in found["outcomes"])
    ]
    ways = ", ".join(f"*{how}*" for how in DAMAGES)
    return [
        f"{found['cases']:,} openings of a run directory in which one file of a checkpoint was "
        f"damaged: {ways} (at random places). *Training* reads of the latest checkpoint the whole "
        "state and the place in the data, and of the best one its loss; *sampling* reads the "
        "parameters. An older checkpoint lies beside the damaged one, but where that is the only "
        "one (without a best one, there is no loss to beat). Values are compared bit by bit with "
        "those that an undamaged run gives.",
        "",
        *table(["checkpoint", "opened for", *OUTCOMES], rows),
    ]
