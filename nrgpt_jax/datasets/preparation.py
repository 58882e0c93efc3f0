"""Tokenization of the parts of a corpus into shards: parallel and resumable.

Each part is one task of a process pool; no library both tokenizes in several processes and keeps
the finished work of a killed one. A task reads its documents one by one and holds at most a
document, a piece of text of about a megabyte and its tokens, so a worker's memory does not grow
with the corpus.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nrgpt_jax import disk
from nrgpt_jax.datasets import shards
from nrgpt_jax.datasets.documents import no_text
from nrgpt_jax.datasets.parts import PART_BYTES, Part
from nrgpt_jax.datasets.places import digest, unwritable
from nrgpt_jax.datasets.shards import ShardWriter, Written
from nrgpt_jax.datasets.tokenizers import Tokenizer, as_record, from_record
from nrgpt_jax.errors import UserError


class Plan(NamedTuple):
    """The parts to prepare, and their tokenizer."""

    parts: list[Part]
    tokenizer: Tokenizer
    fingerprint: str | None = None  # None: computed from the tokens
    field: str = ""  # the text field of a document


class Task(NamedTuple):
    """A part, and the paths of its shards."""

    part: Part
    shards: tuple[Path, ...]  # one for each of its splits
    record: Path  # describes the shards; written after them
    tokenizer: Mapping[str, Any]  # as in tokenizer.json

    @property
    def key(self) -> str:
        """A hash of everything the shards depend on, including remote files."""
        names = [path.name for path in self.shards]
        return digest({"part": self.part.identity, "shards": names, "tokenizer": self.tokenizer})

    def written(self) -> list[Written] | None:
        """Return the contents of the shards, or None unless all are complete and up to date."""
        try:
            record = json.loads(self.record.read_text())
            result = [Written(*values) for values in record["shards"]]
            sizes = [path.stat().st_size for path in self.shards]
            alike = record["key"] == self.key and sizes == [written.bytes for written in result]
            return result if alike else None
        except (OSError, LookupError, ValueError, TypeError):
            return None


def prepare(folder: Path, name: str, make_plan: Callable[[], Plan], workers: int = 0) -> None:
    """Write a prepared data set, or its missing shards.

    Args:
      folder: the output folder; its layout is described in `shards`.
      name: the name of the data set, the prefix of its shard names.
      make_plan: returns the parts of the corpus, in the same order each time.
      workers: the number of local worker processes; 0: one per core.

    Raises:
      UserError: the corpus cannot be read. Finished shards are kept.
    """
    if shards.is_complete(folder):
        return
    with _alone(folder):
        if shards.is_complete(folder):
            return
        print(f"preparing data set {name} in {folder}", file=sys.stderr)
        plan = make_plan()
        tasks = _tasks(plan, folder, name)
        _remove_leftovers(folder, tasks)
        _run([task for task in tasks if task.written() is None], workers)
        _remove_leftovers(folder, tasks)  # a worker may outlive its killed parent for a moment
        _finish(plan, tasks, folder, name)


def _remove_leftovers(folder: Path, tasks: Sequence[Task]) -> None:
    """Remove partial files of killed workers, and shards of earlier remote files."""
    own = {path for task in tasks for path in task.shards}
    for path in (*folder.rglob("*.partial-*"), *folder.glob("*.array_record-*")):
        if path not in own:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a folder, waiting for other processes. Raises UserError if it cannot be written."""
    try:
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        with (folder / "progress" / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that prepares {folder}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise unwritable(error, folder) from None


def _tasks(plan: Plan, folder: Path, name: str) -> list[Task]:
    counts = {split: 0 for part in plan.parts for split in part.splits}
    places = []
    for part in plan.parts:
        places.append([(split, counts[split]) for split in part.splits])
        counts.update({split: place + 1 for split, place in places[-1]})
    path_of = lambda split, place: shards.shard_path(folder, name, split, place, counts[split])
    progress, tokenizer = folder / "progress", as_record(plan.tokenizer)
    return [
        Task(part, tuple(path_of(*p) for p in of_part), progress / f"{i:05d}.json", tokenizer)
        for i, (part, of_part) in enumerate(zip(plan.parts, places, strict=True))
    ]


def _finish(plan: Plan, tasks: Sequence[Task], folder: Path, name: str) -> None:
    splits: dict[str, list[Written]] = {}
    for task in tasks:
        results = task.written()
        if results is None:
            raise UserError(f"{task.record} or its shards are gone; prepare the data again")
        for split, written in zip(task.part.splits, results, strict=True):
            splits.setdefault(split, []).append(written)
    _report(plan, splits)
    record = as_record(plan.tokenizer)
    content = {split: [(w.tokens, w.checksum) for w in all_] for split, all_ in splits.items()}
    fingerprint = plan.fingerprint or digest({"tokenizer": record["kind"], **content})
    about = {"tokenizer": record, "fingerprint": fingerprint}
    shards.write_metadata(folder, name, splits, _dtype(plan.tokenizer), about)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.min_scalar_type(tokenizer.size - 1)


def _report(plan: Plan, splits: Mapping[str, list[Written]]) -> None:
    """Print the split of a corpus and what was skipped. Raises UserError if nothing is left."""
    sums = {name: Written(*np.sum(written, axis=0)) for name, written in splits.items()}
    fields = ("tokens", "documents", "skipped")
    total, count, skipped = (sum(getattr(w, field) for w in sums.values()) for field in fields)
    if total == 0 or (plan.field and total == count):  # empty documents give end tokens only
        if skipped:
            raise UserError(f"all {skipped:,} documents of the corpus {no_text(plan.field)}")
        raise UserError("the corpus is empty: there is nothing to train on")
    if skipped:
        print(f"{skipped:,} documents without a text are left out", file=sys.stderr)
    shares = [f"{n} {w.tokens:,} tokens ({w.tokens / total:.1%})" for n, w in sums.items()]
    print(", ".join(shares), file=sys.stderr)


# A task ------------------------------------------------------------------------------------------


def write_part(task: Task) -> None:
    """Write the shards of a part atomically, then their record."""
    tokenizer = from_record(task.tokenizer)
    with contextlib.ExitStack() as stack:
        partial = [stack.enter_context(disk.replacing(path)) for path in task.shards]
        writers = [ShardWriter(path, _dtype(tokenizer)) for path in partial]
        for writer in writers:
            stack.callback(writer.abandon)
        _tokenize(task.part, tokenizer, dict(zip(task.part.splits, writers, strict=True)))
        written = [writer.close() for writer in writers]
    record = {"key": task.key, "shards": written}
    disk.write_whole(task.record, json.dumps(record).encode())


def _tokenize(part: Part, tokenizer: Tokenizer, writers: Mapping[str, ShardWriter]) -> None:
    """Write the tokens of every document, each followed by an end token or else a line end."""
    for split, document in part.documents():
        writer = writers[split]
        if document.pieces is None:
            writer.skipped += 1
            continue
        for piece in document.pieces:
            writer.write(tokenizer.encode(piece))
        if document.ends:
            end = tokenizer.end
            writer.write(tokenizer.encode("\n") if end is None else np.array([end]))
        writer.documents += 1


# Workers -----------------------------------------------------------------------------------------


def _run(tasks: Sequence[Task], workers: int) -> None:
    from nrgpt_jax.host import cores  # imports JAX, which no worker needs

    total = sum(task.part.size for task in tasks)
    # Starting processes for a small corpus takes longer than preparing it.
    count = min(workers or cores(), len(tasks)) if total > PART_BYTES else 1
    disable = None if total else True  # None: unless stderr is a terminal
    with tqdm(total=total, unit="B", unit_scale=True, disable=disable, dynamic_ncols=True) as bar:
        if count > 1:
            for task in _in_processes(tasks, count):
                bar.update(task.part.size)
            return
        for task in tasks:
            write_part(task)
            bar.update(task.part.size)


def _in_processes(tasks: Sequence[Task], count: int) -> Iterator[Task]:
    # A fork of a process with JAX's threads may hang; a spawned process cannot.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)
    try:
        with _hidden_main():
            futures = {pool.submit(write_part, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed (out of memory?); run it again to resume, with fewer --workers"
        ) from None
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Hide the main script, which spawned processes would otherwise run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent() -> None:
    """Exit this process as soon as its parent is gone, even if the parent was killed."""
    parent: Any = multiprocessing.parent_process()
    watch = lambda: wait([parent.sentinel]) and os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
