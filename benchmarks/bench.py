"""Measures training steps and writes results/benchmarks.json and docs/benchmarks.md.

    make bench [RELEASE=path/to/clone] [ARGS="--only=small"]

With RELEASE, a clone of github.com/bhoov/nrgpt, the authors' code takes turns with ours, eager
and under torch.compile, each in its own process; it needs torch, opt_einsum and attrs in the same
environment, and torch.compile a C++ compiler.
"""

import json
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.cases import CASES
from benchmarks.worker import STEPS
from nrgpt_jax.analysis.examination import plain
from studies.tables import Record, Tables, load, spread, table, versions, write

ROUNDS = 4
PLATFORM = "import jax; print(jax.devices()[0].platform)"
PEERS = ("eager", "compiled")  # of the release


class WorkerStopped(Exception):
    """A process ended where it should not, for want of memory or because it took too long."""


class Worker:
    """A process that makes training steps when told to."""

    def __init__(self, case: int, side: str, release: str | None):
        clone = release if side in PEERS else None
        arguments = json.dumps({"case": case, "side": side, "release": clone})
        command = [sys.executable, "-m", "benchmarks.worker", arguments]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, **pipes)
        limit = threading.Timer(flags.FLAGS.start_limit, self._process.kill)
        limit.start()
        try:
            self.about = self._read()
        finally:
            limit.cancel()
        self.times, self.peak_memory = list[float](), 0.0
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


def measure(index: int, release: str | None) -> Record:
    """The row of one case."""
    case = CASES[index]
    sides = ["ours", *(PEERS if release and case.attention == "full_rank" else ())]
    run_sides = _one_after_another if case.accelerator else _in_turns
    workers = run_sides(index, sides, release)
    about = workers["ours"].about
    tokens = case.batch * case.config().model.context_length
    row: Record = {"title": case.title, "batch": case.batch, "parts": case.parts}
    row["device"] = f"{about['device']}, {versions('jax', 'flax', 'torch')}"
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
    return plain(row)


def _in_turns(index: int, sides: list[str], release: str | None) -> dict[str, Worker]:
    """Of a machine that others use too: what disturbs one side disturbs all."""
    workers = {side: Worker(index, side, release) for side in sides}
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
            worker = Worker(index, side, release)
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
    found = load("benchmarks") or {"steps": []}
    known = {row["title"]: row for row in found["steps"] if "ours" in row}
    unknown = ({"title": c.title, "batch": c.batch, "parts": c.parts} for c in CASES)
    found["steps"] = [known.get(row["title"], row) for row in unknown]
    exact, accelerated = only in (case.title for case in CASES), _output("-c", PLATFORM) != "cpu\n"
    for index, case in enumerate(CASES):
        wanted = only == case.title if exact else only in case.title
        if case.accelerator == accelerated and wanted:
            found["steps"][index] = measure(index, release)
            print(*table(HEAD, [_cells(found["steps"][index])])[2:], flush=True)
            write("benchmarks", found, tables)
    if not only and not accelerated:
        found["memory"] = json.loads(_output("-m", "benchmarks.memory"))
        write("benchmarks", found, tables)


def _output(*words: str) -> str:
    command = [sys.executable, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


# The tables -------------------------------------------------------------------------------------

FORMS = {
    "milliseconds": ".1f",
    "tokens_per_second": ",.0f",
    "share_of_peak": ".0%",
    "peak_memory_gb": ".2f",
    "first_step_seconds": ".0f",
    "times_ours": ".2f",
}
HEAD = (
    *("case", "batch", "parts", "ms a step", "tokens/s", "share of peak", "GB", "start s"),
    *("eager ms", "share", "GB", "times", "compiled ms", "share", "GB", "start s", "times"),
)
SHOWN = {  # of FORMS
    "ours": [*FORMS][:-1],
    "eager": ["milliseconds", "share_of_peak", "peak_memory_gb", "times_ours"],
    "compiled": [name for name in FORMS if name != "tokens_per_second"],
}


def _cells(row: Record) -> list[Any]:
    cells = [row["title"], row["batch"], row["parts"]]
    for side, names in SHOWN.items():
        if side in row:
            cells += [spread([row[side][name]], FORMS[name]) for name in names]
        else:
            why = "stopped" if side in row.get("stopped", ()) else ""
            cells += ["not measured" if side == "ours" else why, *[""] * (len(names) - 1)]
    return cells


def tables(found: dict[str, list[Record]]) -> Tables:
    """Steps by the device that they were measured on; memory; operations."""
    steps: list[str] = []
    for device in dict.fromkeys(row.get("device") for row in found["steps"]):
        rows = [_cells(row) for row in found["steps"] if row.get("device") == device]
        steps += ["", f"{device}:" if device else "Not measured yet:", "", *table(HEAD, rows)]
    result: dict[str, list[str]] = {"steps": steps[1:]}
    rows = []
    for row in found.get("memory", ()):
        changed = dict(row)
        numbers = [changed.pop("temporaries_mb"), changed.pop("compile_seconds")]
        rows.append([", ".join(f"{name}={value}" for name, value in changed.items()), *numbers])
    result["memory"] = table(["changed", "temporaries MB", "compile s"], rows)
    kinds = ("products", "copies", "entries", "exchange")
    rows = []
    for row in found["steps"]:
        if "operations" in row:
            shares = [*(row["operations"][kind] for kind in kinds), row["products_of_peak"]]
            rows.append([row["title"], *(f"{share:.0%}" for share in shares)])
    head = ["case", "products", "copies", "entry by entry", "exchange"]
    result["operations"] = table([*head, "products' share of the peak"], rows)
    return result


def main(argv: list[str]) -> None:
    """Measures, prints, writes."""
    del argv
    release, only = flags.FLAGS.release, flags.FLAGS.only
    if only and not any(only in case.title for case in CASES):
        raise SystemExit("error: --only: no such case; " + ", ".join(c.title for c in CASES))
    if release and not (Path(release) / "model_config.py").exists():
        raise SystemExit(f"error: {release} is not a clone of github.com/bhoov/nrgpt")
    print(table(HEAD, [])[0], flush=True)
    try:
        run(release, only)
    except WorkerStopped:
        raise SystemExit("error: a worker stopped; what it printed is above") from None


if __name__ == "__main__":
    flags.DEFINE_string("release", None, "Folder of a clone of the authors' release.")
    flags.DEFINE_integer("start_limit", 600, "Seconds that a first step may take.", 1)
    flags.DEFINE_string("only", "", "Measure only this case, or those whose titles hold this.")
    app.run(main)
