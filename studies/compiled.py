"""Communication and FLOPs of a compiled program, read from its HLO text and its jaxpr.

Bytes are those that one device sends in a ring of n devices: (n-1)/n of the output of an all-gather
or of the input of a reduce-scatter, and twice that for an all-reduce.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
SENT: Mapping[str, Callable[[float, int], float]] = {
    "all-gather": lambda made, n: made * (n - 1) / n,
    "reduce-scatter": lambda made, n: made * (n - 1),
    "all-reduce": lambda made, n: 2 * made * (n - 1) / n,
    "all-to-all": lambda made, n: made * (n - 1) / n,
    "collective-permute": lambda made, n: made,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\n((?:.*\n)*?)\}", re.MULTILINE)
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(SENT)})(-start)?\(")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.\-]+)")
_BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")


class Exchange(NamedTuple):
    """A collective operation of a step."""

    kind: str
    devices: int  # per replica group
    times: int  # executions per step
    sent: float  # bytes sent per device and step, over all executions


def exchanges(text: str) -> list[Exchange]:
    """Return all collectives of a compiled program, `compiled.as_text()`, with the trip counts of
    loops applied."""
    found = _COMPUTATION.findall(text)
    computations = {name: lines.splitlines() for _, name, lines in found}
    return [e for entry, name, _ in found if entry for e in _walk(name, 1, computations)]


def _walk(name: str, times: int, computations: dict[str, list[str]]) -> Iterator[Exchange]:
    for line in computations.get(name, ()):
        collective = _COLLECTIVE.search(line)
        if collective:
            kind, count = collective[2], _group_size(line)
            sent = SENT[kind](_made(*collective.groups()), count)
            yield Exchange(kind, count, times, times * sent)
            continue
        inner = times * _trips(line, computations) if " while(" in line else times
        for called in _CALLED.findall(line):
            yield from _walk(called, inner, computations)


def _made(shapes: str, kind: str, start: str | None) -> float:
    """Return the bytes of the result; the shapes of an asynchronous start list its operands too."""
    arrays = _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shapes))
    sizes = [BYTES[t] * math.prod(map(int, filter(None, d.split(",")))) for t, d in arrays]
    if start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]
    if start and kind == "collective-permute":
        sizes = sizes[1:2]
    return float(sum(sizes))


def _group_size(line: str) -> int:
    groups = line.partition("replica_groups=")[2]
    if groups.startswith("{{"):
        return groups[2:].partition("}")[0].count(",") + 1
    if groups.startswith("["):
        return int(groups[1:].partition("]")[0].split(",")[-1])
    lengths = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", groups)}
    chosen = re.search(r"\{('\w+'(?:,'\w+')*)\}", groups)
    names = re.findall(r"'(\w+)'", chosen[1]) if chosen else lengths
    return math.prod(lengths[name] for name in names)


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = [known[1]] if known else []
    if condition and not known:
        bounds = _BOUND.findall("\n".join(computations[condition[1]]))
    if not bounds:
        raise ValueError(f"cannot tell how often a loop runs: {line.strip()[:200]}")
    return max(map(int, bounds))


def product_flops(function: Callable, *arguments: Any, axis: str = "", parts: int = 1) -> float:
    """Count the FLOPs of one device in all matrix products of a function, recomputation included.

    Args:
      function, arguments: the function and the arguments to trace it with.
      axis: a mesh axis of `parts` devices. Outside a `shard_map` over this axis, the compiler is
        assumed to split every product over it.
      parts: length of the axis.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr, axis, parts)


def _flops(jaxpr: Any, axis: str, parts: int) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            whole = 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
            total += whole / parts
        times = params.get("length", 1) if name == "scan" else 1
        named = [value for key, value in params.items() if key.endswith("manual_axes")]
        split = 1 if any(axis in axes for axes in named) else parts
        for leaf in jax.tree.leaves([*params.values()]):
            if isinstance(leaf, jex.Jaxpr | jex.ClosedJaxpr):
                total += times * _flops(getattr(leaf, "jaxpr", leaf), axis, split)
    return total
