"""Meshes: where parameters lie, what devices exchange, and that no loss depends on them."""

import functools
import re
from collections import Counter
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from marks import slow_but
from programs_helpers import run_python

from nrgpt_jax.array_types import Batch
from nrgpt_jax.configs import default_config
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.training import optimizers
from nrgpt_jax.training import step as training

ROWS, LENGTH, SYMBOLS = 16, 16, 24
PAPER = "NRGPT_H_FF2W"


def mesh_of(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def settings(name=PAPER, **fields):
    config = default_config()
    config.model.update({"name": name, "vocab_size": SYMBOLS, "context_length": LENGTH})
    config.model.update({"embed_dim": 16, "num_heads": 8, "num_steps": 3, "dropout": 0.1, **fields})
    config.optimizer.accumulation_steps = 2
    return config


def batch_of(number):
    starts = np.random.default_rng(number).integers(0, SYMBOLS, (ROWS, 1))
    tokens = ((starts + np.arange(LENGTH + 1)) % SYMBOLS).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((ROWS, LENGTH), np.float32))


def prepared(config, mesh):
    model = create_model(config)
    optimizer = optimizers.create_optimizer(config.optimizer, 50, parameter_specs(model))
    parts = config.optimizer.accumulation_steps
    step = training.make_train_step(model, optimizer, 0, parts, mesh)
    return model, step, training.create_state(model, optimizer, 0, mesh)


def losses(step, state, mesh, steps):
    """Of the first steps from a state."""
    state, found = jax.tree.map(jnp.copy, state), []  # it is given away
    for number in range(steps):
        state, metrics = step(state, sharding.put_batch(batch_of(number), mesh))
        found.append(float(metrics["train/loss"]))
    return np.array(found)


@functools.cache
def split(axis, name):
    """A model, its training step and state where two devices split one mesh axis."""
    return prepared(settings(name), mesh_of(**{axis: 2}))


@functools.cache
def compiled(axis):
    """The model, and the text of the step."""
    model, step, state = split(axis, PAPER)
    batch = sharding.put_batch(batch_of(0), mesh_of(**{axis: 2}))
    return model, step.lower(state, batch).compile().as_text()  # type: ignore[attr-defined]


@pytest.mark.ci
@pytest.mark.long
def test_losses_are_the_same_on_every_mesh(standard_promotion):
    del standard_promotion
    found = []
    for axis in ("data", "fsdp", "tensor"):
        _, step, state = split(axis, PAPER)
        found.append(losses(step, state, mesh_of(**{axis: 2}), 4))
        assert cast(Any, step)._cache_size() == 1, "later steps compile nothing"
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


EIGHT = """
import jax
import numpy as np
import sharding_test as t
alone = jax.make_mesh((1, 1, 1), t.sharding.AXES, devices=jax.devices()[:1],
                      axis_types=(jax.sharding.AxisType.Auto,) * 3)
config = t.settings(NAME, attention="low_rank")
meshes = [alone, *(t.mesh_of(*lengths) for lengths in MESHES)]
wanted, *found = [t.losses(*t.prepared(config, mesh)[1:], mesh, 50) for mesh in meshes]
print(*(np.abs(losses / wanted - 1).max() for losses in found), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [PAPER, "GPT"])
def test_eight_devices_train_as_one_does(name):
    meshes = "[(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]"
    program = EIGHT.replace("NAME", repr(name)).replace("MESHES", meshes)
    differences = [float(line) for line in run_python(program, devices=8).split()]
    assert len(differences) == 4
    assert max(differences) < 1e-5


@pytest.mark.parametrize("name", slow_but([PAPER], [PAPER, "GPT"]))
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_every_parameter_lies_as_its_axes_say(name, axis):
    model, _, state = split(axis, name)
    specs = traverse_util.flatten_dict(parameter_specs(model))
    letters = {"fsdp": {"D"}, "tensor": {"H", "M", "V"}}[axis]
    moments = [s for s in jax.tree.leaves(state.optimizer, is_leaf=is_tree) if is_tree(s)]
    for tree in (state.params, *moments):
        for path, array in traverse_util.flatten_dict(tree).items():
            parts = 2 if letters & set(specs[path].axes) else 1
            assert array.addressable_shards[0].data.nbytes * parts == array.nbytes, path
    assert len(moments) == 2


def is_tree(leaf):
    return isinstance(leaf, dict)


def collectives(text):
    """The kinds of a compiled program's exchanges, in loops and outside."""
    found: dict[str, Counter] = {"loop": Counter(), "once": Counter()}
    for line in text.splitlines():
        kind = re.search(r" (all-gather|all-reduce|reduce-scatter)\(", line)
        if kind:
            found["loop" if "/while/body" in line else "once"][kind[1]] += 1
    return found


def test_a_weight_is_gathered_once_and_its_gradient_scattered_once(standard_promotion):
    """Not once in each of three steps, nor in each of two parts of the batch."""
    del standard_promotion
    model, text = compiled("fsdp")
    found = collectives(text)
    partitions = sharding.parameter_partitions(parameter_specs(model))
    is_partition = lambda leaf: isinstance(leaf, P)
    parts = [p for p in jax.tree.leaves(partitions, is_leaf=is_partition) if "fsdp" in p]
    assert found["once"]["all-gather"] == found["once"]["reduce-scatter"] == len(parts) > 8
    assert not found["loop"]


def test_a_parameter_without_axes_is_an_error():
    with pytest.raises(TypeError, match="not by a ParameterSpec"):
        sharding.parameter_partitions({"W": jax.nn.initializers.zeros})


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "mesh='data 3 x fsdp 1 x tensor 1' .* there are 8 devices"),
        ({"data": -1, "fsdp": 3}, "data 2 x fsdp 3 .* 8 devices"),
        ({"data": -1, "fsdp": -1}, r"mesh\.fsdp=-1 .* one axis at most"),
        ({"data": 0}, r"mesh\.data=0 .* positive"),
    ],
)
def test_meshes_that_do_not_fit_the_devices(mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_shape({"data": 1, "fsdp": 1, "tensor": 1, **mesh}, 8)


def test_one_axis_takes_the_rest():
    assert sharding.mesh_shape({"data": -1, "fsdp": 2, "tensor": 2}, 8) == (2, 2, 2)
    assert sharding.mesh_shape({"data": 2, "fsdp": -1, "tensor": 1}, 8) == (2, 4, 1)


@pytest.mark.parametrize(
    ("fields", "lengths", "message"),
    [
        ({"num_heads": 3}, {"tensor": 2}, r"model\.num_heads=3 .* mesh\.tensor=2"),
        ({"vocab_size": 65}, {"tensor": 2}, r"model\.vocab_size=65 .* pad it: 66"),
        ({"embed_dim": 24}, {"fsdp": 16}, r"model\.embed_dim=24 .* mesh\.fsdp=16"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(fields, lengths, message):
    sizes = create_model(settings(**fields)).sizes
    with pytest.raises(UserError, match=message):
        sharding.check_sizes(sizes, {"fsdp": 1, "tensor": 1, **lengths})


def test_batches_are_put_together_from_the_rows_of_a_process():
    mesh = mesh_of(data=2)
    whole = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(sharding.local_rows(4, mesh), np.arange(4))
    placed = sharding.put_batch({"x": whole}, mesh)["x"]
    np.testing.assert_array_equal(placed, whole)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    repeated = sharding.put_batch({"x": whole}, mesh_of(tensor=2))["x"]
    assert {shard.data.shape for shard in repeated.addressable_shards} == {(4, 3)}
