"""Measure training steps; write results/benchmarks.json and docs/results/benchmarks.md.

    make bench [RELEASE=path/to/clone] [ARGS="--only=small"]

With RELEASE, a clone of github.com/bhoov/nrgpt, the authors' code is measured too, eager and under
torch.compile, each in its own process. It needs torch, opt_einsum and attrs in the same
environment, and torch.compile needs a C++ compiler.
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
PEERS = ("eager", "compiled")  # modes of the release


class WorkerStopped(Exception):
    """Raised if a process ends early, out of memory or by the time limit."""


class Worker:
    """A process that runs training steps on request."""

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
        """Send a line and return the answer."""
        assert self._process.stdin
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._read()

    def take_turn(self) -> None:
        """Measure some steps."""
        answer = self.ask()
        self.times += answer["times"]
        self.peak_memory = answer["peak_memory"]

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()


def measure(index: int, release: str | None) -> Record:
    """Measure one case and return its row."""
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
    """Interleave the sides, so that other load on a shared machine affects all of them."""
    workers = {side: Worker(index, side, release) for side in sides}
    for _ in range(ROUNDS):
        for worker in workers.values():
            worker.take_turn()
    workers["ours"].operations = workers["ours"].ask("profile")
    for worker in workers.values():
        worker.stop()
    return workers


def _one_after_another(index: int, sides: list[str], release: str | None) -> dict[str, Worker]:
    """Run one side at a time, for the memory of an accelerator; omit sides that stopped."""
    workers = {}
    for side in sides:
        try:
            worker = Worker(index, side, release)
            for _ in range(ROUNDS // 2):  # fewer rounds: there is no other load
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
    """Measure the cases of this machine, writing after each; keep the rows of other machines."""
    found = load("benchmarks") or {"steps": []}
    known = {row["title"]: row for row in found["steps"] if "ours" in row}
    unknown = ({"title": c.title, "batch": c.batch, "parts": c.parts} for c in CASES)
    found["steps"] = [known.get(row["title"], row) for row in unknown]
    exact, accelerated = only in (case.title for case in CASES), _output("-c", PLATFORM) != "cpu\n"
    for index, case in enumerate(CASES):
        wanted = only == case.title if exact else only in case.title
        if case.accelerator == accelerated and wanted:
            found["steps"][index] = measure(index, release)
            took = _cell(found["steps"][index], "ours", "milliseconds")
            print(f"{case.title}: {took} ms per step", flush=True)
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
CASE = {"case": "title", "batch": "batch", "parts": "parts"}
OURS = [  # head of a column, side, number
    ("ms per step", "ours", "milliseconds"),
    ("tokens/s", "ours", "tokens_per_second"),
    ("share of peak", "ours", "share_of_peak"),
]
BESIDE = [
    ("ours, ms", "ours", "milliseconds"),
    ("eager, ms", "eager", "milliseconds"),
    ("factor", "eager", "times_ours"),
    ("compiled, ms", "compiled", "milliseconds"),
    ("factor", "compiled", "times_ours"),
]
MEMORY = [
    *((f"{side}, GB", side, "peak_memory_gb") for side in ("ours", *PEERS)),
    *((f"start, {side}, s", side, "first_step_seconds") for side in ("ours", "compiled")),
]


def _cell(row: Record, side: str, name: str) -> str:
    """Format one number of one side; empty if it was not measured."""
    if side in row:
        return spread([row[side][name]], FORMS[name])
    return "stopped" if side in row.get("stopped", ()) else ""


def tables(found: dict[str, list[Record]]) -> Tables:
    """Return three tables: steps by device, memory, and operations."""
    steps: list[str] = []
    measured = [row for row in found["steps"] if "ours" in row]
    for device in dict.fromkeys(row["device"] for row in measured):
        steps += ["", f"{device}:"]
        own = [row for row in measured if row["device"] == device]
        for columns, first in ((OURS, [*CASE]), (BESIDE, ["case"]), (MEMORY, ["case"])):
            rows = [
                [*(row[CASE[name]] for name in first), *(_cell(row, *of) for _, *of in columns)]
                for row in own
            ]
            steps += ["", *table([*first, *(head for head, *_ in columns)], rows)]
    if missing := [f"- {row['title']}" for row in found["steps"] if "ours" not in row]:
        steps += ["", "Not measured:", "", *missing]
    result: dict[str, list[str]] = {"steps": steps[1:]}
    rows = []
    for row in found.get("memory", ()):
        changed = dict(row)
        numbers = [changed.pop("temporaries_mb"), changed.pop("compile_seconds")]
        rows.append([", ".join(f"{name}={value}" for name, value in changed.items()), *numbers])
    result["memory"] = table(["changed", "temporaries, MB", "compilation, s"], rows)
    kinds = ("products", "copies", "entries", "exchange")
    rows = []
    for row in found["steps"]:
        if "operations" in row:
            shares = [*(row["operations"][kind] for kind in kinds), row["products_of_peak"]]
            rows.append([row["title"], *(f"{share:.0%}" for share in shares)])
    head = ["case", "products", "copies", "elementwise", "exchange"]
    result["operations"] = table([*head, "products' share of peak"], rows)
    return result


def main(argv: list[str]) -> None:
    """Measure, print and write the page."""
    del argv
    release, only = flags.FLAGS.release, flags.FLAGS.only
    if only and not any(only in case.title for case in CASES):
        raise SystemExit("error: --only: no such case; " + ", ".join(c.title for c in CASES))
    if release and not (Path(release) / "model_config.py").exists():
        raise SystemExit(f"error: {release} is not a clone of github.com/bhoov/nrgpt")
    try:
        run(release, only)
    except WorkerStopped:
        raise SystemExit("error: a worker stopped; what it printed is above") from None


if __name__ == "__main__":
    flags.DEFINE_string("release", None, "Folder of a clone of the authors' release.")
    flags.DEFINE_integer("start_limit", 600, "Seconds that a first step may take.", 1)
    flags.DEFINE_string("only", "", "Measure only this case, or those whose titles hold this.")
    app.run(main)
