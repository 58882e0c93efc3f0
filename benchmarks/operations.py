"""What a training step spends its time on: operations of XLA on CPUs, by JAX's profiler.

*Products* are what XLA gives its library for matrices: matrix products, and some sums. *Copies*
change a layout or cut out a part, *exchange* is between devices, and all others, *entries*, go
over arrays entry by entry.
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

KINDS = {  # by the names of operations, the first that fits
    "outside": r"^(while|call|conditional|end: |\$|Thunk|np\.|Pjit|CommonPj|Wait|Rendezvous)",
    "exchange": r"all-reduce|all-gather|reduce-scatter",
    "products": r"ynn_fusion|^dot|custom-call|convolution",
    "copies": r"copy|transpose|slice|concatenate",
    "entries": r"fusion|wrapped|^[a-z-]+$",
}


def seconds_by_kind(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all threads by kind, from the events of a profile (microseconds)."""
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X":
            name = re.sub(r"[.:]\d+", "", event["name"])
            found[next((k for k, of in KINDS.items() if re.search(of, name)), "")] += event["dur"]
    return {kind: found[kind] / 1e6 for kind in KINDS if kind != "outside"}


def profile(step: Callable[[], Any], count: int) -> dict[str, float]:
    """`seconds_by_kind` of N steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                step()
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        return seconds_by_kind(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
