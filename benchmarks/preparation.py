"""Cost of preparing a large corpus, and resumption after a kill.

    python -m benchmarks.preparation --sources=a.txt,b.txt --out=/tmp/preparation [--gigabytes=1]

Repeats texts to documents, as JSON lines and as one text file, and prepares both with the GPT-2
tokenizer. Each preparation is killed (SIGKILL) halfway and resumed; every token is compared with
tiktoken's. Then trains on them, and prints the figures of docs/data.md.
Linux only: memory is the peak resident set (VmHWM) of each process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from absl import app, flags

from nrgpt_jax.datasets.documents import Document, read_articles
from nrgpt_jax.datasets.files import list_files
from nrgpt_jax.datasets.parts import PART_BYTES, drawn_split
from nrgpt_jax.datasets.pipeline import Windows, train_batches
from nrgpt_jax.datasets.shards import features_of, read_metadata, shards_of
from nrgpt_jax.datasets.streams import RecordStream

FRACTION = 0.01


def make_corpora(sources: list[str], out: Path, size: int) -> None:
    """Write `documents/*.jsonl` and `text/all.txt` of `size` bytes each, and `small/` of 10 MB."""
    texts = [
        "".join(d.pieces or ()) for s in sources for d in read_articles(list_files(s, ("",))[0], "")
    ]
    for folder, bytes_ in (("documents", size), ("small", 10**7)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for number in range(files := 4):
            with (out / folder / f"{number}.jsonl").open("w") as file:
                while file.tell() < bytes_ // files:
                    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (out / "text").mkdir(exist_ok=True)
    with (out / "text" / "all.txt").open("w") as file:
        while file.tell() < size:
            file.writelines(texts)


def start(program: str, corpus: Path, cache: Path, *more: str) -> subprocess.Popen:
    """Start a program of the package on a corpus."""
    settings = {"path": corpus, "tokenizer": "gpt2", "validation_fraction": FRACTION}
    fields = [f"--config.data.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", f"nrgpt_jax.{program}", "--config=experiments/text.py"]
    environment = {**os.environ, "NRGPT_CACHE_DIR": str(cache)}
    return subprocess.Popen([*command, *fields, *more], env=environment)


def peaks(pid: int, seen: dict[int, float]) -> None:
    """Record the peak memory (MB) of a process and of its child processes in `seen`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text().splitlines()
            lines = dict(line.split(":", 1) for line in status)
        except (OSError, ValueError):
            continue
        if pid in (int(lines["Pid"]), int(lines["PPid"])) and "VmHWM" in lines:
            seen[int(lines["Pid"])] = int(lines["VmHWM"].split()[0]) / 1024


def prepare(corpus: Path, cache: Path, kill_at: int | None = None) -> tuple[float, dict]:
    """Prepare a corpus, killed once `kill_at` parts exist; return seconds and peak memory (MB)."""
    seen: dict[int, float] = {}
    begin = time.monotonic()
    process = start("prepare", corpus, cache)
    while process.poll() is None:
        peaks(process.pid, seen)
        if kill_at is not None and len(list(cache.rglob("progress/*.json"))) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    parent = seen.pop(process.pid, 0.0)
    return time.monotonic() - begin, {"parent": parent, "workers": sorted(seen.values())}


def prepared(cache: Path, *splits: str) -> RecordStream:
    """Return the concatenated tokens of splits of the only corpus in a cache."""
    (folder,) = (path.parent for path in cache.rglob("dataset_info.json"))
    metadata = read_metadata(folder)
    shards = [shard for split in splits for shard in shards_of(metadata, split)]
    features = features_of(np.dtype(metadata["dtype"]))
    return RecordStream(shards, metadata["record_tokens"], features)


def compare(
    streams: dict[str, RecordStream], expected: Iterator[tuple[str, np.ndarray]]
) -> dict[str, int]:
    """Compare streams with the expected tokens, in order; return document and token counts."""
    places, end, documents = dict.fromkeys(streams, 0), tiktoken.get_encoding("gpt2").eot_token, 0
    for name, tokens in expected:
        found, _ = streams[name].read(places[name], len(tokens))
        np.testing.assert_array_equal(found, tokens)
        places[name] += len(tokens)
        documents += int(tokens[-1] == end)
    assert places == {name: len(stream) for name, stream in streams.items()}
    return {"documents": documents, **places}


def of_documents(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the split and tiktoken's tokens of every document of JSON lines."""
    encoding, known = tiktoken.get_encoding("gpt2"), dict[str, np.ndarray]()
    for path in sorted(folder.glob("*.jsonl")):
        place = 0
        with path.open("rb") as lines:
            for line in lines:
                split = drawn_split(Document(path.name, place, iter(())), FRACTION)
                text = json.loads(line)["text"]
                if text not in known:
                    known[text] = np.array([*encoding.encode_ordinary(text), encoding.eot_token])
                yield split, known[text]
                place += len(line)


def of_text(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tiktoken's tokens of a text that repeats one block.

    GPT-2's pattern never matches across the boundary between a word and the following space, so
    the tokens repeat with the block from such a boundary on.
    """
    encoding, text = tiktoken.get_encoding("gpt2"), path.read_text()
    block = text[: text.index(text[:200], 200)]
    cut, repeats = block.index(" ", 200), len(text) // len(block)
    assert text == block * repeats
    del text
    encode = lambda part: np.array(encoding.encode_ordinary(part), np.int32)
    turned = encode(block[cut:] + block[:cut])
    for part in (encode(block[:cut]), *([turned] * (repeats - 1)), encode(block[cut:])):
        yield "tokens", part
    yield "tokens", np.array([encoding.eot_token])


def first_step(corpus: Path, cache: Path, workdir: Path) -> dict[str, float]:
    """Measure the seconds from program start to the first step, and the peak memory (MB)."""
    model = {"context_length": 64, "embed_dim": 32, "num_steps": 2, "scan_unroll": 2}
    fields = {f"model.{name}": value for name, value in model.items()}
    fields |= {"train_steps": 20, "log_every": 1, "eval_every": 20, "eval_windows": 16}
    fields |= {"data.batch_size": 4, "optimizer.accumulation_steps": 1}
    small = [f"--config.{name}={value}" for name, value in fields.items()]
    begin = time.monotonic()
    process = start("train", corpus, cache, f"--workdir={workdir}", *small)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    seconds, seen = time.monotonic() - begin, dict[int, float]()
    while process.poll() is None:
        peaks(process.pid, seen)
        time.sleep(0.05)
    return {"seconds": round(seconds, 1), "peak MB": round(seen[process.pid])}


def reading(cache: Path) -> dict[str, float]:
    """Measure the memory (MB) of 300 batches of 64 x 1024 tokens, and the ms for 384 windows."""
    begin, stream = _resident(), prepared(cache, "train")
    batches = train_batches(stream, 1024, 64, 0)
    for _ in range(300):
        next(batches)
    resident = _resident() - begin
    windows, rng = Windows(stream, 1024), np.random.default_rng(0)
    times = []
    for _ in range(5):
        starts, at = rng.integers(0, len(windows), 384), time.perf_counter()
        for start in starts:
            windows[start]
        times.append(1e3 * (time.perf_counter() - at))
    milliseconds = round(sorted(times)[2], 1)
    return {"tokens": len(stream), "MB": round(resident, 1), "384 windows, ms": milliseconds}


def _resident() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main(arguments: list[str]) -> None:
    del arguments
    out = Path(OUT.value)
    if not (out / "text").exists():
        make_corpora(SOURCES.value, out, int(GIGABYTES.value * 1e9))
    for name in ("documents", "text"):
        corpus = out / "documents" if name == "documents" else out / "text/all.txt"
        cache, parts = out / f"cache-{name}", GIGABYTES.value * 1e9 / PART_BYTES
        print(name, "killed:", *prepare(corpus, cache, kill_at=max(1, int(parts / 2))))
        finished = sorted(cache.rglob("progress/*.json"))
        kept = {path: path.stat().st_mtime_ns for path in finished}
        assert not list(cache.rglob("dataset_info.json"))
        print(name, f"{len(kept)} parts kept; finished:", *prepare(corpus, cache))
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
        splits = ("train", "validation")
        if name == "documents":
            streams = {split: prepared(cache, split) for split in splits}
            found = compare(streams, of_documents(corpus))
        else:
            found = compare({"tokens": prepared(cache, *splits)}, of_text(corpus))
        print(name, "equal to tiktoken:", found, flush=True)
    for name in ("documents", "small"):
        cache = out / f"cache-{name}"
        if name == "small":
            prepare(out / name, cache)
        print(name, "read:", reading(cache), flush=True)
        for run in ("first", "second"):
            seen = first_step(out / name, cache, out / f"run-{name}-{run}")
            print(name, run, "run, first step:", seen, flush=True)


SOURCES = flags.DEFINE_list("sources", None, "Texts to repeat.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to work in.", required=True)
GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Of documents, and of text.")

if __name__ == "__main__":
    app.run(main)
