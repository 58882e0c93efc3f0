"""Metrics of a run: metrics.jsonl, TensorBoard, optionally Weights & Biases."""

import contextlib
import errno
import json
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from absl import logging

from nrgpt_jax import disk, paths

FILE_NAME = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"
FLUSH_SECONDS = 10  # between flushes of TensorBoard's file

_LINE = msgspec.json.Decoder(dict[str, float | int | str | None])


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, one per line.

    A last line that a kill has truncated is skipped; so are other unreadable lines, with a warning.
    """
    path = workdir / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        logging.warning("%s cannot be read (%s); it counts as empty", path, error.strerror)
        return []
    return [record for _, record in _lines(path, content)]


def _lines(path: Path, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the readable lines, as bytes and as records."""
    records, bad = [], []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = _LINE.decode(line)
            if not isinstance(record["step"], int):
                raise ValueError("its step is not a number")
            records.append((line, record))
        except (KeyError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            if number < len(lines) or line.endswith(b"\n"):
                bad.append(number)
    if bad:
        text = "%s: %d lines cannot be read and are left out (the first is line %d)"
        logging.warning(text, path, len(bad), bad[0])
    return records


class MetricWriter:
    """A writer that appends scalars by step, once it is opened.

    Opening it drops lines that a killed run wrote after the checkpoint at `start_step`: those past
    the checkpoint's `mark()` or, if the file is another one, those of later steps. A bucket cannot
    append: files are written locally, and copied to the bucket by `mark` and `close`.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        config: Mapping[str, Any],
        wandb: bool,
        mark: Mapping[str, Any] | None = None,
    ):
        self._workdir, self._start, self._config = workdir, start_step, config
        self._remote = paths.on_bucket(workdir)
        self._folder = Path(tempfile.mkdtemp()) if self._remote else workdir
        self._path = self._folder / FILE_NAME
        self._with_wandb, self._wandb = wandb, None
        self._tensorboard: _TensorBoard | None = None
        self._mark = mark
        self._waiting = b""  # lines not yet written, as on a full disk
        self._length, self._digest = -1, xxhash.xxh3_128()

    def open(self) -> None:
        """Drop stale lines and open the logs, once. Raises OSError."""
        if self._length >= 0:
            return
        remaining = self._remaining()
        disk.write_whole(self._path, remaining)
        self._length = len(remaining)
        self._digest.update(remaining)
        self._tensorboard = _TensorBoard(self._folder / "tensorboard", self._start + 1)
        if self._with_wandb:
            self._wandb = _start_wandb(self._workdir, self._folder, self._config)

    def _remaining(self) -> bytes:
        """Return the lines to keep when the run resumes."""
        path = self._workdir / FILE_NAME
        content = path.read_bytes() if path.exists() else b""
        if self._mark:
            known = content[: self._mark["bytes"]]
            if xxhash.xxh3_128_hexdigest(known) == self._mark["checksum"]:
                return known
            text = "%s is not the file that the checkpoint at step %d knew; lines up to it are kept"
            logging.warning(text, path, self._start)
            disk.write_whole(self._workdir / DAMAGED, content)
        lines = _lines(path, content)
        remaining = [line for line, record in lines if record["step"] <= self._start]
        return b"".join(line if line.endswith(b"\n") else line + b"\n" for line in remaining)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write named scalars of one step; values that are not finite are written as null."""
        finite = {name: v if math.isfinite(v) else None for name, v in scalars.items()}
        self._waiting += (json.dumps({"step": step, **finite}) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            logging.warning("%s cannot be written now (%s)", self._path, error.strerror)
        if self._tensorboard is not None:
            self._tensorboard.write(step, scalars)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def _flush(self) -> None:
        if self._waiting:
            with self._path.open("r+b", buffering=0) as file:
                file.truncate(self._length)  # drop a partly written line
                file.seek(self._length)
                if file.write(self._waiting) != len(self._waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._length += len(self._waiting)
            self._digest.update(self._waiting)
            self._waiting = b""

    def mark(self) -> dict[str, Any]:
        """Flush; return the file's length and checksum for a checkpoint. Raises OSError."""
        self._flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        self._copy()
        return {"bytes": self._length, "checksum": self._digest.hexdigest()}

    def _copy(self) -> None:
        """Copy the files to the bucket if the run is on one. Raises OSError."""
        if self._remote and self._length >= 0:
            for name in paths.files(self._folder):
                if not name.startswith("wandb/"):
                    disk.write_whole(self._workdir / name, (self._folder / name).read_bytes())

    def close(self) -> None:
        """Flush and close everything. Raises OSError."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        self._flush()
        self._copy()
        if self._remote:
            shutil.rmtree(self._folder, ignore_errors=True)


class SilentWriter:
    """A `MetricWriter` that writes nothing, for every process but the first."""

    def open(self) -> None:
        """Do nothing."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Do nothing."""

    def mark(self) -> dict[str, Any]:
        """Return an empty mark."""
        return {}

    def close(self) -> None:
        """Do nothing."""


class _TensorBoard:
    """An event file of tensorboardX; if it cannot be written, the run continues without it.

    `SummaryWriter` would write in a thread, which a full disk ends; its queue then blocks the run.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._event, self._flushed, self._writer = Event, 0.0, None
        name = f"{int(time.time())}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        self._path = folder / f"events.out.tfevents.{name}"
        with self._unless_it_fails():
            folder.mkdir(exist_ok=True)
            self._writer = RecordWriter(str(self._path))
        self._add(file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)  # voids events of later steps
        self._add(step=purge_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write named scalars of one step."""
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            if math.isfinite(value):
                self._add(step=step, summary=scalar(name, value))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Flush the file to disk."""
        self._flushed = time.monotonic()
        with self._unless_it_fails():
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        with self._unless_it_fails():
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    def _add(self, **fields) -> None:
        with self._unless_it_fails():
            if self._writer is not None:
                event = self._event(wall_time=time.time(), **fields)
                self._writer.write(event.SerializeToString())

    @contextlib.contextmanager
    def _unless_it_fails(self):
        try:
            yield
        except OSError as error:
            logging.warning("%s is no longer written (%s)", self._path, error.strerror)
            self._writer = None


def _start_wandb(workdir: Path, folder: Path, config: Mapping[str, Any]):
    import wandb  # optional; `check_config` has checked that it is installed

    id_file = workdir / "wandb_id"  # a resumed run continues its W&B run
    if not id_file.exists():
        disk.write_whole(id_file, uuid.uuid4().hex[:12].encode())
    settings = {"dir": str(folder), "config": dict(config), "id": id_file.read_text()}
    return wandb.init(project="nrgpt", resume="allow", **settings)
