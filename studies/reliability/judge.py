"""Bitwise contents of run directories, and their differences.

Checkpoints are read by orbax alone, not by the code under test.
"""

import glob
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

CLOCK = ("tokens_per_second", "mfu", "input_wait")  # time-dependent metrics
OF_CLOCK = ("metrics",)  # in a checkpoint's metadata: checksum of metrics.jsonl, time-dependent too
KINDS = ("latest", "best")
SHORT = 200  # characters shown of a value

Run = dict[tuple[str, int, str], Any]  # by (file or checkpoint kind, line or step, name)


def steps_saved(workdir: Path, kind: str) -> list[int]:
    """Return the steps of complete checkpoints of a kind, from their names."""
    names = [path.name for path in (workdir / "checkpoints" / kind).glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(workdir: Path) -> set[str]:
    """Return the names of incomplete saves and files, which a running program may change."""
    saves = glob.glob("checkpoints/*/*", root_dir=workdir)
    partial = glob.glob("*partial*", root_dir=workdir)
    return {name for name in saves if not Path(name).name.isdigit()} | set(partial)


def read(workdir: Path) -> Run:
    """Read a run. Raises the errors of orbax and json if it is damaged."""
    run: Run = {("metrics.jsonl", n, ""): r for n, r in enumerate(read_records(workdir), 1)}
    for kind in KINDS:
        for step in steps_saved(workdir, kind):
            found = read_checkpoint(workdir, kind, step)
            run |= {(kind, step, name): value for name, value in found.items()}
    return run


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without time-dependent values; all lines must be complete."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def read_checkpoint(workdir: Path, kind: str, step: int) -> dict[str, Any]:
    """Read all arrays of a checkpoint by path, and its position in the data and in the run."""
    folder = workdir.absolute() / "checkpoints" / kind / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    about = ocp.checkpointables_metadata(folder)
    wanted = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), about.metadata
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the device differs from that of the save
        content = ocp.load_checkpointables(folder, wanted)
    place = {k: v for k, v in (about.custom_metadata or {}).items() if k not in OF_CLOCK}
    return {**bits(content), "place": place}


def bits(tree: Any) -> dict[str, Any]:
    """Return (dtype, shape, bytes) of every array of a tree, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}


def differences(wanted: Run, found: Run, *, all_steps: bool = True) -> list[str]:
    """Return the differences of a run from the undisturbed one.

    Args:
      wanted, found: the undisturbed run and the other one.
      all_steps: whether both must have checkpoints of the same steps; if not, older checkpoints may
        differ (a stopped run saves at its last step, and keeps that checkpoint).
    """
    newest = {kind: max((s for k, s, _ in wanted if k == kind), default=0) for kind in KINDS}
    keys = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
    if not all_steps:
        older = {(kind, step, name) for kind, step, name in keys if step < newest.get(kind, 0)}
        keys -= older - (wanted.keys() & found.keys())
    return [
        f"{kind}/{step} {name}: {str(found.get(key))[:SHORT]}, not {str(wanted.get(key))[:SHORT]}"
        for key in sorted(keys)
        for kind, step, name in [key]
    ]


def unreadable(folder: Path) -> list[str]:
    """Report the first checkpoint or JSON file that has its final name but cannot be read."""
    name = ""
    try:
        for kind in KINDS:
            for step in steps_saved(folder, kind):
                name = f"{kind}/{step}"
                read_checkpoint(folder, kind, step)
        for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
            name = path.name
            json.loads(path.read_text())
    except Exception as error:  # whatever orbax raises
        return [f"{name} cannot be read: {str(error)[:SHORT]}"]
    return []
