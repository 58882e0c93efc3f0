"""Time of a training step by kind of XLA operation, on CPUs, by JAX's profiler.

*Products* are the operations of XLA's matrix library: matrix products, and some sums. *Copies*
change a layout or slice an array, *exchange* is communication between devices, and *entries* are
all other, elementwise operations.
"""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

KINDS = {  # patterns of operation names; the first match counts
    "outside": r"^(while|call|conditional|end: |\$|Thunk|np\.|Pjit|CommonPj|Wait|Rendezvous)",
    "exchange": r"all-reduce|all-gather|reduce-scatter",
    "products": r"ynn_fusion|^dot|custom-call|convolution",
    "copies": r"copy|transpose|slice|concatenate",
    "entries": r"fusion|wrapped|^[a-z-]+$",
}


def seconds_by_kind(events: list[dict[str, Any]]) -> dict[str, float]:
    """Sum the seconds of all threads by kind, from the events of a profile (microseconds)."""
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X":
            name = re.sub(r"[.:]\d+", "", event["name"])
            found[next((k for k, of in KINDS.items() if re.search(of, name)), "")] += event["dur"]
    return {kind: found[kind] / 1e6 for kind in KINDS if kind != "outside"}


def profile(step: Callable[[], Any], count: int) -> dict[str, float]:
    """Return `seconds_by_kind` of `count` steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                step()
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        return seconds_by_kind(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
