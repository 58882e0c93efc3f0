"""Compile the training step of OpenWebText for TPU v5e slices: writes docs/results/scaling.md.

    python -m studies.scaling [--only=TEXT]

No chip is needed: `libtpu` (pip install 'nrgpt-jax[tpu]') compiles for a topology by name. The page
compares with theory, per device: FLOPs of matrix products, bytes of parameters, optimizer and
temporaries, and bytes sent by collectives. Rows of results/scaling.json are not compiled again.
"""

import collections
import math
import os
import time
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import openwebtext
from nrgpt_jax import cli
from nrgpt_jax.core.parameters import ParameterSpec
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import LanguageModel, flops, parameter_specs, sharding
from nrgpt_jax.training import step as training
from studies.compiled import Exchange, exchanges, product_flops
from studies.measures import training_step
from studies.tables import Record, Tables, load, table, write

TOPOLOGIES = {1: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}  # for 1: its first chip


class Row(NamedTuple):
    """A program to compile."""

    model: str  # a variant of experiments/openwebtext.py, and optionally an attention
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    parts: int  # optimizer.accumulation_steps

    @property
    def name(self) -> str:
        """The unique name of the row."""
        return f"{self.model}, {' x '.join(map(str, self.mesh))}, {self.parts} parts"


PAPER, MESHES = (
    "NRGPT_H_FF2W",
    {
        **{(1, 1, 1): 96, (8, 1, 1): 12, (1, 8, 1): 12, (4, 1, 2): 24},
        **{(64, 1, 1): 2, (1, 64, 1): 2, (8, 8, 1): 2},
        **{(128, 1, 2): 1, (16, 8, 2): 1, (64, 1, 4): 2},
    },
)
OTHERS = (f"{PAPER} low_rank", "GPT", "large")
ROWS = (
    *(Row(PAPER, mesh, parts) for mesh, parts in MESHES.items()),
    *(Row(model, (128, 1, 2), 1) for model in OTHERS),
)


class Chip(NamedTuple):
    """Published figures of a chip, and an assumed utilization."""

    peak: float  # bfloat16 FLOP/s
    sent: float  # bytes per second that a device sends in a ring
    share: float  # of the peak that matrix products reach, assumed


CHIPS = {
    "v5e": Chip(197e12, 90e9, 0.6),  # a link sends 45 GB/s, a ring along one axis uses two
    "H100 SXM": Chip(989e12, 450e9, 0.5),  # NVLink
}


def config_of(row: Row) -> ConfigDict:
    """Return the configuration of a row."""
    variant, _, attention = row.model.partition(" ")
    config = openwebtext.get_config({PAPER: ""}.get(variant, variant))
    config.model.attention = attention or config.model.attention
    config.optimizer.accumulation_steps = row.parts
    return config


def measure(row: Row) -> Record:
    """Compile the program of a row and return its figures."""
    config, mesh = config_of(row), mesh_of(row)
    model, step, state, batch = training_step(config, mesh)
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    where = training.state_shardings(model, state, mesh)
    tokens, tensor = config.data.batch_size * config.model.context_length, row.mesh[2]
    return {
        "name": row.name,
        "devices": mesh.size,
        "compile_seconds": time.perf_counter() - begin,
        "necessary_flops": tokens * flops.train_flops_per_token(model) / mesh.size,
        "flops": product_flops(step, state, batch, axis=sharding.TENSOR, parts=tensor),
        "parameter_bytes": _bytes(state.params, where.params),
        "optimizer_bytes": _bytes(state.optimizer, where.optimizer),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "sent": sent_by(exchanges(compiled.as_text()), tensor),
        "theory": theory(model, row.mesh),
    }


def mesh_of(row: Row) -> jax.sharding.Mesh:
    """Return a mesh of the abstract devices of a topology, to compile for.

    Raises:
      UserError: libtpu is not installed.
    """
    from jax.experimental import topologies

    count = math.prod(row.mesh)
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    try:
        devices = topologies.get_topology_desc(TOPOLOGIES[count], "tpu").devices
    except (RuntimeError, FileNotFoundError) as error:
        cure = "pip install 'nrgpt-jax[tpu]' first"
        raise UserError(f"cannot compile for TPUs ({str(error).splitlines()[0]}): {cure}") from None
    return sharding.make_mesh(dict(zip(sharding.AXES, row.mesh, strict=True)), devices[:count])


def _bytes(tree: Any, where: Any) -> int:
    size = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, tree, where)))


def sent_by(found: list[Exchange], tensor: int) -> dict[str, float]:
    """Sum the bytes that a device sends per step: of parameters by kind of collective, and of
    states under "tensor", in groups of `tensor` devices that share heads and widths."""
    total: dict[str, float] = collections.defaultdict(float)
    for exchange in found:
        between = tensor > 1 and exchange.devices == tensor
        total["tensor" if between else exchange.kind] += exchange.sent
    return dict(total)


def theory(model: LanguageModel, mesh: tuple[int, int, int]) -> dict[str, float]:
    """Compute the bytes that a device sends per step. Parameters on `fsdp` are all-gathered in the
    dtype of products; their gradients are reduce-scattered in float32 and all-reduced over `data`.
    The gradients of other parameters are all-reduced over `data` and `fsdp`."""
    data, fsdp, tensor = mesh
    total: dict[str, float] = collections.defaultdict(float)
    is_spec = lambda leaf: isinstance(leaf, ParameterSpec)
    for spec in jax.tree.leaves(parameter_specs(model), is_leaf=is_spec):
        partition = sharding.parameter_partition(spec)
        size = math.prod(spec.shape(model.sizes)) / (tensor if "tensor" in partition else 1)
        looked_up = spec.axes[:1] in (("V",), ("N",))  # rows of an embedding
        width = 2 if model.dtype == "bfloat16" and spec.is_matrix and not looked_up else 4
        copies = data * fsdp
        if fsdp > 1 and "fsdp" in partition:
            total["all-gather"] += width * size * (fsdp - 1) / fsdp
            total["reduce-scatter"] += 4 * size * (fsdp - 1) / fsdp
            size, copies = size / fsdp, data
        total["all-reduce"] += 2 * 4 * size * (copies - 1) / copies
    return {kind: sent for kind, sent in total.items() if sent}


COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")


def parameter_ratio(found: Record) -> float:
    """Return the ratio of bytes that the program sends for parameters to those of theory."""
    sent = sum(sent for kind, sent in found["sent"].items() if kind != "tensor")
    return sent / sum(found["theory"].values())


def predicted(found: Record, chip: Chip) -> tuple[float, float, float]:
    """Predict the seconds of a step with communication overlapped and not overlapped, and the share
    of the peak (necessary FLOPs) in the latter case."""
    products = found["flops"] / (chip.share * chip.peak)
    exchange = sum(found["sent"].values()) / chip.sent
    worst = products + exchange
    return max(products, exchange), worst, found["necessary_flops"] / worst / chip.peak


HEADS = {
    "held": "TFLOP necessary|TFLOP|parameters GB|optimizer GB|temporaries GB|compile s",
    "sent": "|".join([*COLLECTIVES, "by theory|ratio|between parts of heads and widths"]),
    "steps": "chip|exchange hidden ms|not hidden ms|share of the peak, not hidden",
}


def tables(found: list[Record]) -> Tables:
    """Return three tables: memory and FLOPs per device, bytes sent, and predicted step times."""
    mega = lambda size: f"{size / 1e6:.1f}" if size else "0"
    rows: dict[str, list[list[str]]] = {name: [] for name in HEADS}
    for r in found:
        name, expected = r["name"], sum(r["theory"].values())
        bytes_ = [r[f"{part}_bytes"] / 1e9 for part in ("parameter", "optimizer", "temporary")]
        numbers = [r["necessary_flops"] / 1e12, r["flops"] / 1e12, *bytes_]
        rows["held"].append([name, *(f"{n:.2f}" for n in numbers), f"{r['compile_seconds']:.0f}"])
        *sent, between = (mega(r["sent"].get(kind, 0.0)) for kind in (*COLLECTIVES, "tensor"))
        ratio = f"{parameter_ratio(r):.2f}" if expected else ""
        rows["sent"].append([name, *sent, mega(expected), ratio, between])
        for chip in CHIPS if r["devices"] == 8 else ("v5e",):
            best, worst, share = predicted(r, CHIPS[chip])
            milliseconds = f"{1e3 * best:.0f}", f"{1e3 * worst:.0f}"
            rows["steps"].append([name, chip, *milliseconds, f"{share:.0%}"])
    first = "model; data x fsdp x tensor; parts"
    return {name: table([first, *HEADS[name].split("|")], rows[name]) for name in HEADS}


def main(only: str) -> None:
    """Compile the missing rows and write the page."""
    known = {record["name"]: record for record in load("scaling")}
    save = lambda: write("scaling", [known[r.name] for r in ROWS if r.name in known], tables, 1)
    for row in ROWS:
        if row.name not in known and only in row.name:
            known[row.name] = measure(row)
            print(f"{row.name}: {known[row.name]['compile_seconds']:.0f} s", flush=True)
            save()
    save()


if __name__ == "__main__":
    _only = flags.DEFINE_string("only", "", "Rows whose name has this in it.")
    cli.run(lambda: main(_only.value))
