"""What is read from compiled programs: collectives in loops, their groups, and matrix products."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from marks import slow_but
from sharding_test import compiled, mesh_of

from studies import scaling
from studies.compiled import _group_size, exchanges, product_flops


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[8]", 2),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
    ],
)
def test_groups_in_every_notation(groups, count):
    line = "  %a = f32[8]{0} all-gather(%b), replica_groups=GROUPS, dimensions={0}"
    line = line.replace("GROUPS", groups)
    assert _group_size(line) == count


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("(f32[10]{0}, f32[80]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8]", 280),
        ("(f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%a)", 40),
        ("(f32[8]{0}, bf16[8]{0}) all-reduce-start(%a, %b), replica_groups={{0,1}}", 48),
    ],
)
def test_asynchronous_ones_count_what_they_make(line, sent):
    (found,) = exchanges(f"ENTRY %main (x: f32[]) -> f32[] {{\n  %c = {line}\n}}")
    assert found.sent == sent


def test_loops_count_as_often_as_they_run():
    mesh = mesh_of(data=2)

    def function(x):
        double = lambda x, _: (jax.lax.psum(x, "data") * 0.5, None)
        inner = lambda x, _: (jax.lax.scan(double, x, length=5)[0], None)
        x = jax.lax.scan(inner, x, length=3)[0]
        return jax.lax.all_gather(x, "data", tiled=True)

    split = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    text = jax.jit(split).lower(jnp.ones((8, 4))).compile().as_text()
    assert text is not None
    sums = sum(e.sent for e in exchanges(text) if e.kind == "all-reduce")
    (gather,) = (e for e in exchanges(text) if e.kind == "all-gather")
    assert sums == 15 * 4 * 4 * 4  # 15 times 4 x 4 numbers, of 2 devices
    assert gather == ("all-gather", 2, 1, 4 * 8 * 4 / 2)


def test_products_of_loops_count_as_often_as_they_run():
    w = jnp.ones((8, 8))
    function = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]
    x, flops = jnp.ones((4, 8)), 5 * 2 * 4 * 8 * 8
    assert product_flops(function, x) == flops
    assert product_flops(function, x, axis="data", parts=2) == flops / 2
    rows = {"mesh": mesh_of(data=2), "in_specs": P("data"), "out_specs": P("data")}
    own = jax.shard_map(function, **rows)
    assert product_flops(own, x, axis="data", parts=2) == flops / 2, "as written there"


@pytest.mark.parametrize("axis", slow_but(["fsdp"], ["data", "fsdp"]))
def test_parameters_and_gradients_are_exchanged_as_theory_says(axis, standard_promotion):
    del standard_promotion
    model, text = compiled(axis)
    sent = scaling.sent_by(exchanges(text), 1)
    expected = scaling.theory(model, (2, 1, 1) if axis == "data" else (1, 2, 1))
    assert parameter_ratio(sent, expected) == pytest.approx(1.0, abs=0.1)
    assert ("all-gather" in sent) == ("reduce-scatter" in sent) == (axis == "fsdp"), sent


def parameter_ratio(sent, expected):
    return scaling.parameter_ratio({"sent": sent, "theory": expected})


def test_rows_are_programs_that_can_be():
    for row in scaling.ROWS:
        config = scaling.config_of(row)
        data, fsdp, _ = row.mesh
        assert config.data.batch_size % (data * fsdp * row.parts) == 0
        assert math.prod(row.mesh) in scaling.TOPOLOGIES
