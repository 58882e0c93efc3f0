"""How training scales: compiles the OpenWebText step for slices of TPU v5e, writes docs/scaling.md.

    python -m studies.scaling [--only=TEXT]

No chip is needed: `libtpu` (pip install 'nrgpt-jax[tpu]') compiles for a topology by name. Of each
row one device's matrix products, bytes of parameters, optimizer and temporaries, and bytes sent in
each kind of collective are read from the program, and compared with what theory says. A row that
docs/scaling.json has is not compiled again.
"""

import collections
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import openwebtext
from nrgpt_jax import cli
from nrgpt_jax.array_types import Batch
from nrgpt_jax.core.parameters import ParameterSpec
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import LanguageModel, create_model, flops, parameter_specs, sharding
from nrgpt_jax.training import optimizers
from nrgpt_jax.training import step as training
from studies.compiled import Exchange, exchanges, product_flops
from studies.tables import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOPOLOGIES = {1: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}  # of 1, the first chip


class Row(NamedTuple):
    """A program to compile."""

    model: str  # a variant of experiments/openwebtext.py, and fields of its model
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    parts: int  # optimizer.accumulation_steps

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh)

    @property
    def name(self) -> str:
        """What tells it apart."""
        return f"{self.model}, {' x '.join(map(str, self.mesh))}, {self.parts} parts"


PAPER, LOW_RANK = "NRGPT_H_FF2W", "NRGPT_H_FF2W low_rank"
ROWS = (
    Row(PAPER, (1, 1, 1), 96),
    Row(PAPER, (8, 1, 1), 12),
    Row(PAPER, (1, 8, 1), 12),
    Row(PAPER, (4, 1, 2), 24),
    Row(PAPER, (64, 1, 1), 2),
    Row(PAPER, (1, 64, 1), 2),
    Row(PAPER, (8, 8, 1), 2),
    Row(PAPER, (128, 1, 2), 1),
    Row(PAPER, (16, 8, 2), 1),
    Row(PAPER, (64, 1, 4), 2),
    Row(LOW_RANK, (128, 1, 2), 1),
    Row("GPT", (128, 1, 2), 1),
    Row("large", (128, 1, 2), 1),
)


class Chip(NamedTuple):
    """Published figures of a chip, and what is assumed of it."""

    name: str
    peak: float  # bfloat16 operations a second
    sent: float  # bytes a second that a device sends in a ring
    share: float  # of the peak that products reach, assumed


CHIPS = (
    # 197 TFLOP/s; a link carries 45 GB/s one way, and a ring along one axis uses two
    Chip("v5e", 197e12, 90e9, 0.6),
    # 989 TFLOP/s; NVLink 450 GB/s one way
    Chip("H100 SXM", 989e12, 450e9, 0.5),
)


def config_of(row: Row) -> ConfigDict:
    """The experiment's configuration."""
    variant, _, attention = row.model.partition(" ")
    config = openwebtext.get_config({PAPER: ""}.get(variant, variant))
    if attention:
        config.model.attention = attention
    config.optimizer.accumulation_steps = row.parts
    return config


def measure(row: Row) -> dict[str, Any]:
    """What is read from the program of a row."""
    config, mesh = config_of(row), mesh_of(row)
    model = create_model(config)
    optimizer = optimizers.create_optimizer(
        config.optimizer, config.train_steps, parameter_specs(model)
    )
    step: Any = training.make_train_step(model, optimizer, 0, row.parts, mesh)
    state = jax.eval_shape(lambda: training.create_state(model, optimizer, 0, mesh))
    shape = config.data.batch_size, config.model.context_length
    types: Any = [jax.ShapeDtypeStruct(shape, t) for t in ("int32", "int32", "float32")]
    begin = time.perf_counter()
    compiled = step.lower(state, Batch(*types)).compile()
    where = training.state_shardings(model, state, mesh)
    found = exchanges(compiled.as_text())
    tokens, per_token = math.prod(shape), flops.train_flops_per_token(model)
    return {
        "name": row.name,
        "devices": row.devices,
        "compile_seconds": time.perf_counter() - begin,
        "necessary_flops": tokens * per_token / row.devices,
        "flops": product_flops(step, state, Batch(*types), axis=sharding.TENSOR, parts=row.mesh[2]),
        "parameter_bytes": _bytes(state.params, where.params),
        "optimizer_bytes": _bytes(state.optimizer, where.optimizer),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "sent": sent_by(found, row.mesh[2]),
        "theory": theory(model, row.mesh),
    }


def mesh_of(row: Row) -> jax.sharding.Mesh:
    """Devices that one can compile for.

    Raises:
      UserError: libtpu is not installed.
    """
    from jax.experimental import topologies

    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    try:
        devices = topologies.get_topology_desc(TOPOLOGIES[row.devices], "tpu").devices
    except (RuntimeError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot compile for TPUs ({reason}): pip install 'nrgpt-jax[tpu]' first"
        ) from None
    lengths = dict(zip(sharding.AXES, row.mesh, strict=True))
    return sharding.make_mesh(lengths, devices[: row.devices])


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
    type that products read it in, and its gradient scattered once in float32; what is left of
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


# The page -----------------------------------------------------------------------------------------

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")


def parameter_ratio(found: dict[str, Any]) -> float:
    """Bytes of parameters that the program sends, over those of theory."""
    sent = sum(sent for kind, sent in found["sent"].items() if kind != "tensor")
    return sent / sum(found["theory"].values())


def predicted(found: dict[str, Any], chip: Chip) -> tuple[float, float, float]:
    """Seconds of a step if exchange is hidden behind products and if it is not, and the share of
    the peak, counting necessary operations, in the worse case."""
    products = found["flops"] / (chip.share * chip.peak)
    exchange = sum(found["sent"].values()) / chip.sent
    worst = products + exchange
    return max(products, exchange), worst, found["necessary_flops"] / worst / chip.peak


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The tables."""
    giga = lambda size: f"{size / 1e9:.2f}"
    mega = lambda size: f"{size / 1e6:.1f}" if size else "0"
    lines = ["## One device of each mesh", ""]
    head = ["model; data x fsdp x tensor; parts", "TFLOP necessary", "TFLOP", "parameters GB"]
    head += ["optimizer GB", "temporaries GB", "compile s"]
    cells = [
        [r["name"], f"{r['necessary_flops'] / 1e12:.2f}", f"{r['flops'] / 1e12:.2f}"]
        + [giga(r[f"{part}_bytes"]) for part in ("parameter", "optimizer", "temporary")]
        + [f"{r['compile_seconds']:.0f}"]
        for r in rows
    ]
    lines += [*table(head, cells), "", "## What it sends in a step, MB", ""]
    head = ["model; data x fsdp x tensor; parts", *COLLECTIVES, "by theory", "ratio"]
    head += ["between parts of heads and widths"]
    cells = []
    for r in rows:
        ours = [mega(r["sent"].get(kind, 0.0)) for kind in COLLECTIVES]
        expected = sum(r["theory"].values())
        ratio = f"{parameter_ratio(r):.2f}" if expected else ""
        cells.append([r["name"], *ours, mega(expected), ratio, mega(r["sent"].get("tensor", 0.0))])
    lines += [*table(head, cells), "", "## Predicted steps", ""]
    head = ["model; data x fsdp x tensor; parts", "chip", "exchange hidden ms", "not hidden ms"]
    cells = []
    for r in rows:
        for chip in CHIPS if r["devices"] == 8 else CHIPS[:1]:
            best, worst, share = predicted(r, chip)
            cells.append([r["name"], chip.name, f"{1e3 * best:.0f}", f"{1e3 * worst:.0f}"])
            cells[-1].append(f"{share:.0%}")
    return [*lines, *table([*head, "share of the peak, not hidden"], cells)]


def main(only: str) -> None:
    """Compiles what is missing, and writes the page."""
    path = DOCS / "scaling.json"
    known = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    for row in ROWS:
        if row.name not in known and only in row.name:
            known[row.name] = measure(row)
            print(f"{row.name}: {known[row.name]['compile_seconds']:.0f} s", flush=True)
            rows = [known[row.name] for row in ROWS if row.name in known]
            path.write_text(json.dumps(rows, indent=1) + "\n")
    rows = [known[row.name] for row in ROWS if row.name in known]
    target = DOCS / "scaling.md"
    before = target.read_text().partition("<!-- measured -->")[0] if target.exists() else ""
    target.write_text("\n".join([before + "<!-- measured -->", "", *page(rows)]) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    _only = flags.DEFINE_string("only", "", "Rows whose name has this in it.")
    cli.run(lambda: main(_only.value))
