"""Prints what training steps spend their time on, as one JSON list on the last line.

    python -m benchmarks.operations [--only=small]

Every operation that XLA runs on CPUs is timed by JAX's profiler. *Products* are matrix products,
*copies* change a layout or cut out a part, *exchange* is between devices; all others go over
arrays entry by entry. Each case is measured in a process of its own.
"""

import collections
import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 3
KINDS = {  # by the names of XLA's CPU operations, the first that fits
    "outside": r"^(while|call|conditional|end: |\$|Thunk|np\.|Pjit|CommonPj|Wait)",
    "exchange": r"all-reduce|all-gather|reduce-scatter|Rendezvous",
    "products": r"ynn_fusion|^dot|custom-call|convolution",
    "copies": r"copy|transpose|slice|concatenate|^bitcast_[a-z]*fusion$",
    "entries": r"fusion|wrapped|^[a-z-]+$",
}


def kind_of(name: str) -> str:
    """The kind of an operation by its name in a profile."""
    return next((kind for kind, names in KINDS.items() if re.search(names, name)), "outside")


def shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all threads by kind, from the events of a profile (microseconds)."""
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X":
            found[kind_of(re.sub(r"[.:]\d+", "", event["name"]))] += event["dur"] / 1e6
    found.pop("outside", None)
    return dict(found)


def measure(index: int) -> dict[str, Any]:
    """The row of one case, measured in this process."""
    from benchmarks.cases import CASES
    from benchmarks.worker import ours

    case = CASES[index]
    step, about = ours(case)
    import jax

    for _ in range(STEPS):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                step()
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    seconds = shares(events)
    total = sum(seconds.values())
    tokens = case.batch * case.config().model.context_length
    flops = STEPS * about["flops_per_token"] * tokens
    per_thread = about["peak_flops"] / jax.device_count()
    row: dict[str, Any] = {"title": case.title}
    row |= {kind: seconds.get(kind, 0.0) / total for kind in KINDS if kind != "outside"}
    row["products_of_peak"] = flops / seconds["products"] / per_thread
    return row


def main(only: str = "") -> None:
    """Measures every case for this machine, each in a process of its own."""
    from benchmarks.cases import CASES

    rows = []
    for index, case in enumerate(CASES):
        if case.accelerator or only not in case.title:
            continue
        program = f"import json; from benchmarks.operations import measure; m = measure({index}); "
        command = [sys.executable, "-c", program + "print(json.dumps(m))"]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*(argument.removeprefix("--only=") for argument in sys.argv[1:]))
