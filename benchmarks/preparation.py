"""What preparing a large corpus costs, and whether a killed preparation goes on.

    python -m benchmarks.preparation --sources=a.txt,b.txt --out=/tmp/preparation [--gigabytes=1]

Makes documents by repeating texts, as JSON lines and as one text file; prepares both with GPT-2's
byte pairs, kills each preparation (SIGKILL) when half of it is done and starts it again; compares
every token with tiktoken's of the same documents; trains on them. Prints what docs/data.md shows.
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
    """`documents/*.jsonl` of `size` bytes, `text/all.txt` as large, and `small/` of 10 MB."""
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


def command(program: str, corpus: Path, *more: str) -> list[str]:
    settings = {"path": corpus, "tokenizer": "gpt2", "validation_fraction": FRACTION}
    fields = [f"--config.data.{name}={value}" for name, value in settings.items()]
    return [
        *(sys.executable, "-m", f"nrgpt_jax.{program}", "--config=experiments/text.py"),
        *fields,
        *more,
    ]


def peaks(pid: int, seen: dict[int, float]) -> None:
    """Notes the peak memory (MB) of a process and of those that it started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text().splitlines()
            lines = dict(line.split(":", 1) for line in status)
        except (OSError, ValueError):
            continue
        if pid in (int(lines["Pid"]), int(lines["PPid"])) and "VmHWM" in lines:
            seen[int(lines["Pid"])] = int(lines["VmHWM"].split()[0]) / 1024


def prepare(corpus: Path, cache: Path, kill_at: int | None = None) -> tuple[float, dict]:
    """Seconds, and peak memory by process; killed when `kill_at` parts are there."""
    seen: dict[int, float] = {}
    begin = time.monotonic()
    environment = {**os.environ, "NRGPT_CACHE_DIR": str(cache)}
    process = subprocess.Popen(command("prepare", corpus), env=environment)
    while process.poll() is None:
        peaks(process.pid, seen)
        if kill_at is not None and len(list(cache.rglob("progress/*.json"))) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    parent = seen.pop(process.pid, 0.0)
    return time.monotonic() - begin, {"parent": parent, "workers": sorted(seen.values())}


def compare(corpus: Path, folder: Path) -> dict[str, int]:
    """Compares every token of both splits with tiktoken's; documents and tokens."""
    metadata, encoding = read_metadata(folder), tiktoken.get_encoding("gpt2")
    features = features_of(np.dtype(metadata["dtype"]))
    known: dict[str, np.ndarray] = {}
    streams = {
        split: RecordStream(shards_of(metadata, split), metadata["record_tokens"], features)
        for split in ("train", "validation")
    }
    places, documents = dict.fromkeys(streams, 0), 0
    for split, text in texts(corpus):
        if text not in known:
            known[text] = np.array([*encoding.encode_ordinary(text), encoding.eot_token])
        expected, at = known[text], places[split]
        found, _ = streams[split].read(at, len(expected))
        np.testing.assert_array_equal(found, expected)
        places[split], documents = at + len(expected), documents + 1
    assert places == {split: len(stream) for split, stream in streams.items()}
    return {"documents": documents, **places}


def texts(corpus: Path) -> Iterator[tuple[str, str]]:
    """The documents of JSON lines, each with its split."""
    for path in sorted(corpus.glob("*.jsonl")):
        place = 0
        with path.open("rb") as lines:
            for line in lines:
                at = Document(path.name, place, iter(()))
                yield drawn_split(at, FRACTION), json.loads(line)["text"]
                place += len(line)


def first_step(corpus: Path, cache: Path, workdir: Path) -> dict[str, float]:
    """Seconds from the start of the program to the first step, and memory then (MB)."""
    model = {"context_length": 64, "embed_dim": 32, "num_steps": 2, "scan_unroll": 2}
    small = [f"--config.model.{field}={value}" for field, value in model.items()]
    small += ["--config.train_steps=20", "--config.log_every=1", "--config.eval_every=20"]
    small += ["--config.data.batch_size=4", "--config.optimizer.accumulation_steps=1"]
    environment = {**os.environ, "NRGPT_CACHE_DIR": str(cache)}
    begin = time.monotonic()
    process = subprocess.Popen(
        command("train", corpus, f"--workdir={workdir}", *small, "--config.eval_windows=16"),
        env=environment,
    )
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    seconds, seen = time.monotonic() - begin, dict[int, float]()
    while process.poll() is None:
        peaks(process.pid, seen)
        time.sleep(0.05)
    return {"seconds": round(seconds, 1), "peak MB": round(seen[process.pid])}


def compare_text(path: Path, folder: Path) -> dict[str, int]:
    """Compares every token of one text, the same block many times, with tiktoken's.

    GPT-2's pattern never matches across a place between a word and the blank after it, so the
    tokens repeat with the block from such a place on.
    """
    metadata, encoding = read_metadata(folder), tiktoken.get_encoding("gpt2")
    features = features_of(np.dtype(metadata["dtype"]))
    shards = [shard for split in ("train", "validation") for shard in shards_of(metadata, split)]
    stream = RecordStream(shards, metadata["record_tokens"], features)
    text = path.read_text()
    block = text[: text.index(text[:200], 200)]
    cut, repeats = block.index(" ", 200), len(text) // len(block)
    assert text == block * repeats
    del text
    encode = lambda part: np.array(encoding.encode_ordinary(part), np.int32)
    turned, place = encode(block[cut:] + block[:cut]), 0
    for part in (encode(block[:cut]), *([turned] * (repeats - 1)), encode(block[cut:])):
        np.testing.assert_array_equal(stream.read(place, len(part))[0], part)
        place += len(part)
    assert len(stream) == place + 1
    assert stream.read(place, 1)[0].tolist() == [encoding.eot_token]
    return {"documents": 1, "tokens": len(stream)}


def reading(cache: Path) -> dict[str, float]:
    """Memory (MB) of 300 batches of 64 windows of 1024, and milliseconds for 384 windows."""
    begin = _resident()
    metadata = read_metadata(prepared_folder(cache))
    features = features_of(np.dtype(metadata["dtype"]))
    stream = RecordStream(shards_of(metadata, "train"), metadata["record_tokens"], features)
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


def prepared_folder(cache: Path) -> Path:
    (folder,) = (path.parent for path in cache.rglob("dataset_info.json"))
    return folder


def main(arguments: list[str]) -> None:
    del arguments
    out = Path(OUT.value)
    if not (out / "text").exists():
        make_corpora(SOURCES.value, out, int(GIGABYTES.value * 1e9))
    for name, compared in (("documents", compare), ("text", compare_text)):
        corpus = out / name if name == "documents" else out / name / "all.txt"
        cache = out / f"cache-{name}"
        parts = GIGABYTES.value * 1e9 / PART_BYTES
        print(name, "killed:", *prepare(corpus, cache, kill_at=max(1, int(parts / 2))))
        finished = sorted(cache.rglob("progress/*.json"))
        kept = {path: path.stat().st_mtime_ns for path in finished}
        assert not list(cache.rglob("dataset_info.json"))
        print(name, f"{len(kept)} parts kept; finished:", *prepare(corpus, cache))
        assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
        print(name, "equal to tiktoken:", compared(corpus, prepared_folder(cache)), flush=True)
    for name in ("documents", "small"):
        cache = out / f"cache-{name}"
        if name == "small":
            prepare(out / name, cache)
        print(name, "read:", reading(cache), flush=True)
        for run in ("first", "second"):
            found = first_step(out / name, cache, out / f"run-{name}-{run}")
            print(name, run, "run, first step:", found, flush=True)


SOURCES = flags.DEFINE_list("sources", None, "Texts to repeat.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to work in.", required=True)
GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Of documents, and of text.")

if __name__ == "__main__":
    app.run(main)
