"""What a run directory holds, bit by bit, and how two differ.

Checkpoints are read by orbax alone, not by the code that is judged.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

CLOCK = ("tokens_per_second", "mfu", "input_wait")  # what a clock decides
OF_CLOCK = ("metrics",)  # of a checkpoint's place: the checksum of metrics.jsonl with its times
KINDS = ("latest", "best")
SHORT = 200  # characters of a difference that are told


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    arrays: dict[str, np.ndarray]  # parameters, optimizer and step, by path
    place: dict[str, Any]  # in the data and in the course of the run
    metrics: dict[str, float]  # of the best one: its loss


class Run(NamedTuple):
    """What a run directory holds."""

    records: list[dict[str, Any]]  # of metrics.jsonl, without what a clock decides
    checkpoints: dict[str, dict[int, Checkpoint]]  # by kind and step


def steps_saved(workdir: Path, kind: str) -> list[int]:
    """Steps of checkpoints, by their names."""
    folder = workdir / "checkpoints" / kind
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(workdir: Path) -> list[str]:
    """Names in the folders of checkpoints that are not those of checkpoints, and partial files."""
    folders = [workdir / "checkpoints" / kind for kind in KINDS]
    names = [f"{f.name}/{p.name}" for f in folders if f.exists() for p in f.iterdir()]
    partial = [p.name for p in workdir.iterdir() if "partial" in p.name] if workdir.exists() else []
    return sorted([n for n in names if not n.rpartition("/")[2].isdigit()] + partial)


def read(workdir: Path) -> Run:
    """Reads a run. Raises what orbax and json raise where it is damaged."""
    saved = {
        kind: {step: read_checkpoint(workdir, kind, step) for step in steps_saved(workdir, kind)}
        for kind in KINDS
    }
    return Run(read_records(workdir), saved)


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, every one of which must be whole."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def read_checkpoint(workdir: Path, kind: str, step: int) -> Checkpoint:
    """All arrays of a checkpoint, on one device, and what is said of them."""
    folder = workdir.absolute() / "checkpoints" / kind / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    about = ocp.checkpointables_metadata(folder)
    saved = {name: tree for name, tree in about.metadata.items() if name != "metrics"}
    wanted = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read onto other devices
        content = ocp.load_checkpointables(folder, wanted)
    leaves = jax.tree_util.tree_leaves_with_path(content)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    metrics = folder / "metrics" / "metrics"
    return Checkpoint(
        arrays,
        {k: v for k, v in (about.custom_metadata or {}).items() if k not in OF_CLOCK},
        json.loads(metrics.read_text()) if metrics.exists() else {},
    )


def differences(wanted: Run, found: Run, *, all_steps: bool = True) -> list[str]:
    """How a run differs from the one that was left alone; empty if it does not.

    Args:
      wanted, found: the two.
      all_steps: of the latest checkpoints, all must be of the same steps; else the newest (a run
        that was stopped and saved in between keeps another one before it).
    """
    told = _differing_records(wanted.records, found.records)
    for kind in KINDS:
        there, here = wanted.checkpoints[kind], found.checkpoints[kind]
        steps = (sorted(there), sorted(here)) if all_steps else (max(there), max(here, default=-1))
        if steps[0] != steps[1]:
            told.append(f"{kind} checkpoints are of steps {steps[1]}, not {steps[0]}")
        for step in sorted(set(there) & set(here)):
            told += [f"{kind}/{step}: {d}" for d in different(there[step], here[step])]
    return told


def _differing_records(wanted: list[dict], found: list[dict]) -> list[str]:
    told = []
    if len(wanted) != len(found):
        told.append(f"metrics.jsonl has {len(found)} lines, not {len(wanted)}")
    for there, here in zip(wanted, found, strict=False):
        if there != here:
            told.append(f"metrics.jsonl: {str(here)[:SHORT]}, not {str(there)[:SHORT]}")
    return told[:3]


def different(wanted: Checkpoint, found: Checkpoint) -> list[str]:
    """How a checkpoint differs from another."""
    told = [
        f"{name} {here}, not {there}"
        for name, there, here in (
            ("place", wanted.place, found.place),
            ("metrics", wanted.metrics, found.metrics),
            ("arrays", sorted(wanted.arrays), sorted(found.arrays)),
        )
        if there != here
    ]
    both = set(wanted.arrays) & set(found.arrays)
    told += [
        f"{n} differs" for n in sorted(both) if not same_bits(wanted.arrays[n], found.arrays[n])
    ]
    return told


def same_bits(one: Any, other: Any) -> bool:
    """Whether two arrays are the same in type, shape and every bit."""
    one, other = np.asarray(one), np.asarray(other)
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and one.tobytes() == other.tobytes()
