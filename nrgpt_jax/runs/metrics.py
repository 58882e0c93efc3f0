"""What a run writes while it trains: metrics.jsonl, TensorBoard, optionally Weights & Biases."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE_NAME = "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a line cut short by a kill is left out."""
    path = workdir / FILE_NAME
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class MetricWriter:
    """Appends scalars by step. Lines past `start_step` (of a run that was killed) are dropped."""

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any], wandb: bool):
        kept = [record for record in read_metrics(workdir) if record["step"] <= start_step]
        path = workdir / FILE_NAME
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1, flush_secs=10
        )
        self._wandb = _start_wandb(workdir, config) if wandb else None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes named scalars of one step."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class SilentWriter:
    """A `MetricWriter` that writes nothing: of every process but the first."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _start_wandb(workdir: Path, config: Mapping[str, Any]):
    import wandb  # optional; `validate` has seen that it is there

    id_file = workdir / "wandb_id"  # a run that goes on stays one run
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    settings = {"dir": str(workdir), "config": dict(config), "id": id_file.read_text()}
    return wandb.init(project="nrgpt", resume="allow", **settings)
