"""Turns the parts of a corpus into shards: in parallel, and from where it was interrupted.

Each part is one task, for a process of its own or for a worker of Apache Beam. A task reads its
documents one by one and keeps no more than a document, a piece of text of about a megabyte and its
tokens, so the memory of a worker does not grow with the corpus.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shlex
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nrgpt_jax.datasets import shards
from nrgpt_jax.datasets.documents import no_text
from nrgpt_jax.datasets.parts import PART_BYTES, Part
from nrgpt_jax.datasets.records import digest, unwritable
from nrgpt_jax.datasets.shards import Layout, ShardWriter, Written
from nrgpt_jax.datasets.tokenizers import Tokenizer, as_record, from_record
from nrgpt_jax.errors import UserError


class Engine(NamedTuple):
    """What runs the tasks."""

    workers: int = 0  # processes on this machine; 0: one a core
    beam_options: str | None = None  # Apache Beam instead, with these options


LOCAL = Engine()


class Plan(NamedTuple):
    """What is to be prepared."""

    parts: list[Part]
    tokenizer: Tokenizer
    fingerprint: str | None = None  # None: of the tokens
    field: str = ""  # the name of the text in a document


class Task(NamedTuple):
    """A part, and where its shards go."""

    number: int
    part: Part
    layout: Layout
    shards: tuple[tuple[str, int], ...]  # split, place in the split
    tokenizer: Mapping[str, Any]  # as in tokenizer.json

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return np.min_scalar_type(from_record(self.tokenizer).size - 1)

    @property
    def key(self) -> str:
        """Changes with all that its shards depend on, such as files at an address by now."""
        settings = {"part": self.part.identity, "shards": self.shards, "tokenizer": self.tokenizer}
        return digest(settings)


def prepare(folder: Path, name: str, make_plan: Callable[[], Plan], engine: Engine) -> None:
    """Writes a data set, or what is missing of it.

    Args:
      folder: where to; `shards` says what lies there.
      name: of the data set, which begins the names of its shards.
      make_plan: finds the parts of the corpus, in the same order each time.
      engine: what runs the tasks.

    Raises:
      UserError: the corpus cannot be read. What was written is kept.
    """
    if shards.is_complete(folder):
        return
    with _alone(folder):
        if shards.is_complete(folder):
            return
        print(f"preparing data set {name} in {folder}", file=sys.stderr)
        _remove_partial(folder)
        plan = make_plan()
        tasks = _tasks(plan, folder, name)
        missing = [task for task in tasks if _result(task) is None]
        _run(missing, engine)
        _remove_partial(folder)  # a worker may outlive its killed parent for a moment
        _finish(plan, tasks)


def _remove_partial(folder: Path) -> None:
    """Removes what killed workers leave, of shards and of records of progress."""
    for path in folder.rglob("*.partial-*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another process that prepares the same. What cannot be written is one line."""
    try:
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        with (folder / "progress" / "lock").open("w") as file:
            _lock(file, folder)
            yield
    except OSError as error:
        raise unwritable(error, folder) from None


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that prepares {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


def _tasks(plan: Plan, folder: Path, name: str) -> list[Task]:
    counts: dict[str, int] = {"train": 0, "validation": 0}
    places_of_parts = []
    for part in plan.parts:
        places_of_parts.append(tuple((split, counts.get(split, 0)) for split in part.splits))
        counts.update({split: number + 1 for split, number in places_of_parts[-1]})
    layout = Layout(folder, name, {split: count for split, count in counts.items() if count})
    tokenizer = as_record(plan.tokenizer)
    created = zip(plan.parts, places_of_parts, strict=True)
    return [Task(i, part, layout, place, tokenizer) for i, (part, place) in enumerate(created)]


def _result(task: Task) -> list[Written] | None:
    return shards.finished(task.layout, task.number, task.key, task.shards)


def _finish(plan: Plan, tasks: list[Task]) -> None:
    splits: dict[str, list[Written]] = {}
    for task in tasks:
        results = _result(task)
        if results is None:
            raise UserError(
                f"part {task.number} is not in {task.layout.folder}; do all workers write there?"
            )
        for (split, _), written in zip(task.shards, results, strict=True):
            splits.setdefault(split, []).append(written)
    _report(plan, splits)
    record = as_record(plan.tokenizer)
    content = {split: [(w.tokens, w.checksum) for w in all_] for split, all_ in splits.items()}
    fingerprint = plan.fingerprint or digest({"tokenizer": record["kind"], **content})
    about = {"tokenizer": record, "fingerprint": fingerprint}
    shards.write_metadata(tasks[0].layout, splits, tasks[0].dtype, about)


def _report(plan: Plan, splits: Mapping[str, list[Written]]) -> None:
    """Says how a corpus was split and what was left out. Raises UserError if nothing is left."""
    sums = {name: [sum(c) for c in zip(*written, strict=True)] for name, written in splits.items()}
    complete = {name: Written(*sums_of) for name, sums_of in sums.items()}
    skipped = sum(w.skipped for w in complete.values())
    total, count = (sum(getattr(w, n) for w in complete.values()) for n in ("tokens", "documents"))
    if total == 0 or (plan.field and total == count):  # of empty documents there are only ends
        if skipped:
            raise UserError(f"all {skipped:,} documents of the corpus {no_text(plan.field)}")
        raise UserError("the corpus is empty: there is nothing to train on")
    if skipped:
        print(f"{skipped:,} documents without a text are left out", file=sys.stderr)
    shares = [f"{n} {w.tokens:,} tokens ({w.tokens / total:.1%})" for n, w in complete.items()]
    print(", ".join(shares), file=sys.stderr)


# A task ------------------------------------------------------------------------------------------


def write_part(task: Task) -> None:
    """Writes the shards of a part and the record of it, unless they are there."""
    if _result(task) is not None:
        return
    tokenizer = from_record(task.tokenizer)
    paths = {split: task.layout.shard(split, number) for split, number in task.shards}
    with contextlib.ExitStack() as stack:
        writers = {split: ShardWriter(path, task.dtype) for split, path in paths.items()}
        for writer in writers.values():
            stack.callback(writer.abandon)
        _tokenize(task.part, tokenizer, writers)
        written = [writers[split].close() for split, _ in task.shards]
    record = {"key": task.key, "shards": written}
    shards.write_text(task.layout.progress(task.number), json.dumps(record))


def _tokenize(part: Part, tokenizer: Tokenizer, writers: Mapping[str, ShardWriter]) -> None:
    """Every document, followed by the token of an end (a line end, where there is none)."""
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


# What runs them ----------------------------------------------------------------------------------


def _run(tasks: list[Task], engine: Engine) -> None:
    if engine.beam_options is not None:
        _run_on_beam(tasks, engine.beam_options)
        return
    from nrgpt_jax.host import cores  # brings JAX, which no worker needs

    total = sum(task.part.size for task in tasks)
    # Starting processes for a small corpus takes longer than preparing it.
    count = min(engine.workers or cores(), len(tasks)) if total > PART_BYTES else 1
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        for task in _in_turn(tasks) if count < 2 else _in_processes(tasks, count):
            bar.update(task.part.size)


def _in_turn(tasks: list[Task]) -> Iterator[Task]:
    for task in tasks:
        write_part(task)
        yield task


def _in_processes(tasks: list[Task], count: int) -> Iterator[Task]:
    # A fork of a process in which JAX has started threads may hang; a new process cannot.
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
    """New processes would run the program that started them once more, as far as it is a script."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_on_beam(tasks: list[Task], options: str) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("Apache Beam is missing: python -m pip install -e '.[beam]'") from None
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(write_part)
