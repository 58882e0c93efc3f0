"""Progress of the runs of a sweep, read from their run directories, and its summary table."""

import csv
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nrgpt_jax import disk
from nrgpt_jax.configs import flattened
from nrgpt_jax.datasets.tokenizers import RESTORE
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, num_parameters
from nrgpt_jax.runs.directory import CONFIG_FILE, FREE, differences, in_use, load_config
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE

FAILURE_FILE = "failed.json"
EVERY = 10.0  # seconds between two readings of all runs
STATES = ("done", "diverged", "training", "stopped", "failed", "waiting")


class Progress(NamedTuple):
    """The progress of one run."""

    state: str  # one of STATES
    step: int
    of: int  # number of training steps
    losses: list[float]  # validation losses of all evaluations, nats; NaN: the run has diverged


def progress(workdir: Path, config: ConfigDict) -> Progress:
    """Read the progress of a run from its directory."""
    lines = read_metrics(workdir) if workdir.is_dir() else []
    observed = [line["val/loss"] for line in lines if "val/loss" in line]
    losses = [math.nan if loss is None else loss for loss in observed]
    step = max((line["step"] for line in lines), default=0)
    state = "stopped" if lines else "waiting"
    if is_done(workdir):
        state = "diverged" if math.isnan(losses[-1]) else "done"
    elif in_use(workdir):
        state = "training"
    elif failure_of(workdir):
        state = "failed"
    return Progress(state, step, config.train_steps, losses)


def is_done(workdir: Path) -> bool:
    """Return whether a run is trained to its last step, evaluated and saved.

    Raises UserError if its config.json cannot be read.
    """
    path = workdir / CONFIG_FILE
    try:
        target = disk.read_json(path, dict[str, Any], RESTORE).get("train_steps")
    except (FileNotFoundError, NotADirectoryError):
        return False
    paths = workdir / "checkpoints/latest" / str(target), workdir / WEIGHTS_FILE
    saved = any(path.exists() for path in paths)
    return saved and any(r["step"] == target and "val/loss" in r for r in read_metrics(workdir))


def check_same(workdir: Path, config: ConfigDict) -> None:
    """Raise UserError if a directory holds a run with another configuration."""
    if not (workdir / CONFIG_FILE).exists():
        return
    recorded = load_config(workdir)
    asked = config.copy_and_resolve_references()
    asked.model.vocab_size = recorded.model.vocab_size  # resolved by the run, as the fingerprint
    asked.data.fingerprint = recorded.data.fingerprint
    changed = differences(recorded.to_dict(), asked.to_dict())
    changed = [change for change in changed if change.split("=")[0] not in FREE]
    if changed:
        cure = "name another --runs, or remove it"
        raise UserError(f"{workdir} holds another run: {changed[0]}; {cure}")


def failure_of(workdir: Path) -> str:
    """Return why a run has failed; an empty string if it has not."""
    try:
        result = disk.read_json(workdir / FAILURE_FILE, dict[str, Any], "remove it")
    except FileNotFoundError:
        return ""
    return "" if is_done(workdir) else f"{result.get('kind')}: {result.get('why')}"


def write_summary(path: Path, configs: Mapping[Path, ConfigDict]) -> list[dict[str, Any]]:
    """Write a CSV file with one line per run, and return its lines.

    A line has the state, step, number of parameters, losses and varied fields of the run.
    """
    root = path.parent
    varied = varied_fields(configs)
    lines = []
    for workdir, config in configs.items():
        observed = progress(workdir, config)
        finite = [loss for loss in observed.losses if math.isfinite(loss)]
        lines.append(
            {
                "run": str(workdir.relative_to(root)),
                "state": observed.state,
                "step": observed.step,
                "parameters": parameters(workdir),
                "val/loss": observed.losses[-1] if observed.losses else None,
                "best val/loss": min(finite, default=None),
                "failure": failure_of(workdir),
                **varied[workdir],
            }
        )
    with disk.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return lines


def parameters(workdir: Path) -> int | None:
    """Return the number of parameters of a run; None before it has started."""
    if not (workdir / CONFIG_FILE).exists():
        return None
    return num_parameters(create_model(load_config(workdir)))


def varied_fields(configs: Mapping[Path, ConfigDict]) -> dict[Path, dict[str, Any]]:
    """Return the fields in which the runs differ, with their values, by run directory."""
    flat = {workdir: flattened(config.to_dict()) for workdir, config in configs.items()}
    first = next(iter(flat.values()))
    every = dict.fromkeys(name for f in flat.values() for name in f)  # options are not in all
    names = [n for n in every if any(f.get(n) != first.get(n) for f in flat.values())]
    return {workdir: {name: f.get(name) for name in names} for workdir, f in flat.items()}


def status(configs: Mapping[Path, ConfigDict]) -> list[str]:
    """Return a line with the number of runs by state, and a line per running or failed run."""
    observed = {workdir: progress(workdir, config) for workdir, config in configs.items()}
    counts = Counter(run.state for run in observed.values())
    lines = [", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])]
    for workdir, run in observed.items():
        name = "/".join(workdir.parts[-2:])
        if run.state == "training":
            loss = f", validation loss {run.losses[-1]:.4f}" if run.losses else ""
            lines.append(f"  {name}: step {run.step:,} of {run.of:,}{loss}")
        if run.state == "failed":
            lines.append(f"  {name}: failed: {failure_of(workdir)}")
    return lines


class Watch:
    """Printer of the progress of all runs; on a terminal, it updates its lines in place."""

    def __init__(self, configs: Mapping[Path, ConfigDict]):
        self._configs, self._printed, self._next = configs, list[str](), 0.0
        self._in_place = sys.stdout.isatty()

    def __call__(self) -> None:
        """Print the progress, at most every `EVERY` seconds."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        self.show()

    def show(self) -> None:
        """Print the progress now."""
        lines = status(self._configs)
        if self._in_place:
            up = f"\x1b[{len(self._printed)}A\x1b[J" if self._printed else ""
            sys.stdout.write(up + "\n".join(lines) + "\n")
        elif lines[:1] != self._printed[:1]:
            sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        self._printed = lines
