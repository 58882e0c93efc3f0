"""Compiles the training step of OpenWebText for slices of TPU v5e: writes docs/results/scaling.md.

    python -m studies.scaling [--only=TEXT]

No chip is needed: `libtpu` (pip install 'nrgpt-jax[tpu]') compiles for a topology by name. Of each
row one device's matrix products, bytes of parameters, optimizer and temporaries, and bytes sent in
each kind of collective are read from the program, and compared with what theory says. A row that
results/scaling.json has is not compiled again.
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

TOPOLOGIES = {1: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}  # of 1, the first chip


class Row(NamedTuple):
    """A program to compile."""

    model: str  # a variant of experiments/openwebtext.py, and fields of its model
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    parts: int  # optimizer.accumulation_steps

    @property
    def name(self) -> str:
        """What tells it apart."""
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
    """Published figures of a chip, and what is assumed of it."""

    peak: float  # bfloat16 operations a second
    sent: float  # bytes a second that a device sends in a ring
    share: float  # of the peak that products reach, assumed


CHIPS = {
    "v5e": Chip(197e12, 90e9, 0.6),  # a link sends 45 GB/s, a ring along one axis uses two
    "H100 SXM": Chip(989e12, 450e9, 0.5),  # NVLink
}


def config_of(row: Row) -> ConfigDict:
    """The experiment's configuration."""
    variant, _, attention = row.model.partition(" ")
    config = openwebtext.get_config({PAPER: ""}.get(variant, variant))
    config.model.attention = attention or config.model.attention
    config.optimizer.accumulation_steps = row.parts
    return config


def measure(row: Row) -> Record:
    """What is read from the program of a row."""
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
    """Devices that one can compile for.

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
    """Bytes that a device sends in a step: of parameters by kind, and of states between the parts
    of heads and widths (the groups of `tensor` devices)."""
    total: dict[str, float] = collections.defaultdict(float)
    for exchange in found:
        between = tensor > 1 and exchange.devices == tensor
        total["tensor" if between else exchange.kind] += exchange.sent
    return dict(total)


def theory(model: LanguageModel, mesh: tuple[int, int, int]) -> dict[str, float]:
    """Bytes that a device sends of parameters: what is split over fsdp is gathered once, in the
    type that products read it in, and its gradient scattered once in float32; the remainder of
    gradients is summed over `data`, and of those that are not split over `fsdp` too."""
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
    """Bytes of parameters that the program sends, over those of theory."""
    sent = sum(sent for kind, sent in found["sent"].items() if kind != "tensor")
    return sent / sum(found["theory"].values())


def predicted(found: Record, chip: Chip) -> tuple[float, float, float]:
    """Seconds of a step if exchange is hidden behind products and if it is not, and the share of
    the peak, counting necessary operations, in the worse case."""
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
    """What a device holds and computes, what it sends, and what a step may take."""
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
    """Compiles what is missing, and writes the page."""
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
