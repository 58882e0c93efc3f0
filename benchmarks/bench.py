"""Measures training steps and writes docs/benchmarks.json and docs/benchmarks.md.

    make bench [RELEASE=path/to/clone] [ARGS="--only=small"]

With RELEASE, a clone of github.com/bhoov/nrgpt, the authors' code takes turns with ours, eager
and under torch.compile, each in its own process; it needs torch, opt_einsum and attrs in the same
environment, and torch.compile a C++ compiler.
"""

import json
import platform
import statistics
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.cases import CASES
from benchmarks.worker import STEPS

ROUNDS = 4
PEERS = ("eager", "compiled")  # of the release
DOCS = Path(__file__).resolve().parent.parent / "docs"

_RELEASE = flags.DEFINE_string("release", None, "Folder of a clone of the authors' release.")
_START_LIMIT = flags.DEFINE_integer("start_limit", 600, "Seconds that a first step may take.", 1)
_ONLY = flags.DEFINE_string("only", "", "Measure only this case, or those whose titles hold this.")


class WorkerStopped(Exception):
    """A process ended where it should not, for want of memory or because it took too long."""


class Worker:
    """A process that makes training steps when told to."""

    def __init__(self, case: int, side: str, release: str | None = None):
        arguments = json.dumps({"case": case, "side": side, "release": release})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        limit = threading.Timer(_START_LIMIT.value, self._process.kill)
        limit.start()
        try:
            self.about = self._read()
        finally:
            limit.cancel()
        self.times: list[float] = []
        self.peak_memory = 0.0
        self.operations: dict[str, float] = {}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise WorkerStopped
        return json.loads(line)

    def ask(self, what: str = "") -> dict[str, Any]:
        """The answer to a line."""
        assert self._process.stdin
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._read()

    def take_turn(self) -> None:
        """Some steps, measured."""
        answer = self.ask()
        self.times += answer["times"]
        self.peak_memory = answer["peak_memory"]

    def stop(self) -> None:
        """Ends the process."""
        self._process.communicate()


def measure(index: int, release: str | None) -> dict[str, Any]:
    """The row of one case."""
    case = CASES[index]
    sides = ["ours", *(PEERS if release and case.attention == "full_rank" else ())]
    run_sides = _one_after_another if case.accelerator else _in_turns
    workers = run_sides(index, sides, release)
    about = workers["ours"].about
    tokens = case.batch * case.config().model.context_length
    row: dict[str, Any] = {"title": case.title, "batch": case.batch, "parts": case.parts}
    row |= {"device": f"{about['device']}, {_versions()}"}
    for name, worker in workers.items():
        median = statistics.median(worker.times)
        row[name] = {
            "milliseconds": 1e3 * median,
            "first_step_seconds": worker.about["first_step_seconds"],
            "tokens_per_second": tokens / median,
            "share_of_peak": about["flops_per_token"] * tokens / median / about["peak_flops"],
            "peak_memory_gb": worker.peak_memory / 1e9,
            "times_ours": median / statistics.median(workers["ours"].times),
        }
    row["stopped"] = [side for side in sides if side not in workers]
    if seconds := workers["ours"].operations:
        row["operations"] = {kind: part / sum(seconds.values()) for kind, part in seconds.items()}
        rate = STEPS * about["flops_per_token"] * tokens / seconds["products"]
        row["products_of_peak"] = rate / (about["peak_flops"] / about["devices"])
    return row


def _in_turns(index: int, sides: list[str], release: str | None) -> dict[str, Worker]:
    """Of a machine that others use too: what disturbs one side disturbs all."""
    workers = {side: Worker(index, side, release if side in PEERS else None) for side in sides}
    for _ in range(ROUNDS):
        for worker in workers.values():
            worker.take_turn()
    workers["ours"].operations = workers["ours"].ask("profile")
    for worker in workers.values():
        worker.stop()
    return workers


def _one_after_another(index: int, sides: list[str], release: str | None) -> dict[str, Worker]:
    """Of an accelerator, whose memory is for one side at a time; without those that stopped."""
    workers = {}
    for side in sides:
        try:
            worker = Worker(index, side, release if side in PEERS else None)
            for _ in range(ROUNDS // 2):  # nothing else disturbs it
                worker.take_turn()
        except WorkerStopped:
            if side == "ours":
                raise
            continue
        worker.stop()
        workers[side] = worker
        print(f"  {side}: {1e3 * statistics.median(worker.times):.1f} ms", file=sys.stderr)
    return workers


def run(release: str | None, only: str) -> None:
    """Measures the cases of this machine and writes each as it is done; keeps what others had."""
    on_accelerator, found = _on_accelerator(), _measured_before()
    known = {row["title"]: row for row in found["steps"] if "ours" in row}
    unknown = ({"title": c.title, "batch": c.batch, "parts": c.parts} for c in CASES)
    found["steps"] = [known.get(row["title"], row) for row in unknown]
    exact = only in (case.title for case in CASES)
    for index, case in enumerate(CASES):
        wanted = only == case.title if exact else only in case.title
        if case.accelerator == on_accelerator and wanted:
            found["steps"][index] = measure(index, release)
            print(_step_line(found["steps"][index]), flush=True)
            _write(found)
    if not only and not on_accelerator:
        module = [sys.executable, "-m", "benchmarks.memory"]
        out = subprocess.run(module, stdout=subprocess.PIPE, text=True, check=True)
        found["memory"] = json.loads(out.stdout)
        _write(found)


def _write(found: dict[str, Any]) -> None:
    (DOCS / "benchmarks.json").write_text(json.dumps(found, indent=1) + "\n")
    (DOCS / "benchmarks.md").write_text(table(found))


def _measured_before() -> dict[str, Any]:
    path = DOCS / "benchmarks.json"
    return json.loads(path.read_text()) if path.exists() else {"steps": []}


def _on_accelerator() -> bool:
    program = "import jax; print(jax.devices()[0].platform)"
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return out.stdout.strip() != "cpu"


def _versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "flax", "torch"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join(versions)


# The tables -------------------------------------------------------------------------------------

HEAD = (
    "| case | batch | parts | ms a step | tokens/s | share of peak | GB | start s "
    "| eager ms | share | GB | times | compiled ms | share | GB | start s | times |"
)


def _step_line(row: dict[str, Any]) -> str:
    cells = [row["title"], row["batch"], row["parts"]]
    if "ours" not in row:
        return _line([*cells, "not measured", *[""] * 13])
    ours = row["ours"]
    cells += [f"{ours['milliseconds']:.1f}", f"{ours['tokens_per_second']:,.0f}"]
    cells += [f"{ours['share_of_peak']:.0%}", f"{ours['peak_memory_gb']:.2f}"]
    cells += [f"{ours['first_step_seconds']:.0f}"]
    for side in PEERS:
        if side not in row:
            stopped = "stopped" if side in row.get("stopped", ()) else ""
            cells += [stopped, *[""] * (4 if side == "compiled" else 3)]
            continue
        peer = row[side]
        cells += [f"{peer['milliseconds']:.1f}", f"{peer['share_of_peak']:.0%}"]
        cells += [f"{peer['peak_memory_gb']:.2f}"]
        cells += [f"{peer['first_step_seconds']:.0f}"] * (side == "compiled")
        cells += [f"{peer['times_ours']:.2f}"]
    return _line(cells)


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(head: str) -> str:
    return "|" + "---|" * (head.count("|") - 1)


def table(found: dict[str, Any]) -> str:
    """docs/benchmarks.md"""
    lines = [
        "# Training speed and memory",
        "",
        "Written by `make bench RELEASE=path/to/clone`. One training step: forward, backward,",
        "clipping, AdamW, in the precision of the configuration; medians of ours,",
        "the authors' PyTorch code as it is (*eager*) and under torch.compile (*compiled*), each",
        "in a process of its own, which take turns on a CPU and come one after another on an",
        "accelerator; *times*: their milliseconds over ours; *stopped*: the process ended, for",
        "want of memory or because its first step took longer than `--start_limit`. Ours runs as",
        "`make train` runs it: on CPUs the batch in *parts* (`optimizer.accumulation_steps`) and",
        "`nrgpt_jax/host.py` in effect; the authors' runs the whole batch at once, with the",
        "settings that PyTorch comes with. *Start* is the time to build the model and to make the",
        "first step, compilation included, less what is kept of earlier ones.",
        "*Share of peak* counts necessary operations only (`nrgpt_jax/models/flops.py`), against",
        "the chip's data sheet or, on CPUs, a float32 matrix product measured in JAX.",
        "*Memory* is the device's, or on CPUs that of the whole process, JAX imported in both.",
    ]
    for device in dict.fromkeys(row.get("device") for row in found["steps"]):
        rows = [row for row in found["steps"] if row.get("device") == device]
        lines += ["", f"{device}:" if device else "Not measured yet:", "", HEAD, _rule(HEAD)]
        lines += map(_step_line, rows)
    if "memory" in found:
        head = "| changed | temporaries MB | compile s |"
        lines += [
            "",
            "Memory that one step of `small NRGPT_H_FF2W` needs on a CPU besides parameters and",
            "optimizer (XLA's plan; 4,096 tokens a batch, in one part, `scan_unroll=1`), and the",
            "time to compile it:",
            "",
            head,
            _rule(head),
        ]
        for row in found["memory"]:
            cells = dict(row)
            numbers = [cells.pop("temporaries_mb"), cells.pop("compile_seconds")]
            changed = ", ".join(f"{name}={value}" for name, value in cells.items())
            lines.append(_line([changed, *numbers]))
    return "\n".join([*lines, *_operations(found["steps"])]) + "\n"


def _operations(steps: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in steps if "operations" in row]
    if not rows:
        return []
    kinds = ("products", "copies", "entries", "exchange")
    head = "| case | products | copies | entry by entry | exchange | products' share of the peak |"
    lines = [
        "",
        "What the time of all threads goes to in our steps, by JAX's profiler: what XLA gives its",
        "library for matrices (products, and some sums); copies; operations entry by entry;",
        "exchange between devices. And how fast the first of them is, counting necessary",
        "operations, against the peak of a core.",
        "",
        head,
        _rule(head),
    ]
    for row in rows:
        shares = [*(row["operations"][kind] for kind in kinds), row["products_of_peak"]]
        lines.append(_line([row["title"], *(f"{share:.0%}" for share in shares)]))
    return lines


def main(argv: list[str]) -> None:
    """Measures, prints, writes."""
    del argv
    if _ONLY.value and not any(_ONLY.value in case.title for case in CASES):
        raise SystemExit("error: --only: no such case; " + ", ".join(c.title for c in CASES))
    if _RELEASE.value and not (Path(_RELEASE.value) / "model_config.py").exists():
        raise SystemExit(f"error: {_RELEASE.value} is not a clone of github.com/bhoov/nrgpt")
    print(HEAD, flush=True)
    try:
        run(_RELEASE.value, _ONLY.value)
    except WorkerStopped:
        raise SystemExit("error: a worker stopped; what it printed is above") from None
    print(f"written to {DOCS / 'benchmarks.md'}")


if __name__ == "__main__":
    app.run(main)
