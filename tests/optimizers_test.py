"""Schedules have their named shapes; decay touches matrices only; Muon orthogonalizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.parameters import matrix, stacked, vector
from nrgpt_jax.models import model_names, parameter_specs, sharding
from nrgpt_jax.training import optimizers
from nrgpt_jax.training.step import TrainState, state_shardings

pytestmark = pytest.mark.usefixtures("standard_promotion")


def settings(**fields):
    c = default_config().optimizer
    c.update({"learning_rate": 1e-2, "final_learning_rate": 1e-4, "warmup_steps": 10, **fields})
    return c


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("cosine", 5.05e-3, 1e-4), ("exponential", 1e-3, 1e-4), ("constant", 1e-2, 1e-2)],
)
def test_schedules(schedule, middle, end):
    rate = optimizers.learning_rate_schedule(settings(schedule=schedule), 110)
    assert float(rate(0)) == pytest.approx(1e-2 / 11, rel=1e-4)
    assert float(rate(9)) < float(rate(10)) == pytest.approx(1e-2, rel=1e-4)
    assert float(rate(60)) == pytest.approx(middle, rel=1e-3)
    assert float(rate(110)) == pytest.approx(end, rel=1e-3)
    assert float(rate(500)) == pytest.approx(end, rel=1e-3)
    at_once = optimizers.learning_rate_schedule(settings(schedule=schedule, warmup_steps=0), 100)
    assert float(at_once(0)) == pytest.approx(1e-2, rel=1e-3)


MATRICES = {"embedding", "kernel", "J", "W1", "W2", "eta", "W", "up", "down"}
MATRICES |= {"query", "key", "value", "projection"}


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("name", model_names())
def test_weight_decay_on_matrices_or_on_all(name, blocks):
    fields: dict[str, Any] = dict.fromkeys(("learn_alpha", "learn_beta", "per_step_scale"), True)
    fields |= {"name": name, "energies": ("injection", "leak"), "combination": "mixture"}
    fields |= {"num_distinct_layers": blocks}
    config = default_config().model
    config.update({"vocab_size": 11, "embed_dim": 8, "num_heads": 2, **fields})
    specs = parameter_specs(create_model(config))
    mask = traverse_util.flatten_dict(optimizers.decay_mask(specs, "matrices"))
    assert {path[-1] for path, decayed in mask.items() if decayed} <= MATRICES
    assert not {path[-1] for path, decayed in mask.items() if not decayed} & MATRICES
    assert all(jax.tree.leaves(optimizers.decay_mask(specs, "all")))


def test_update_decays_and_clips():
    params = {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    c = settings(schedule="constant", warmup_steps=0, weight_decay=0.5)
    specs = {"head": {"kernel": matrix("D V"), "bias": vector("V")}}
    optimizer = optimizers.create_optimizer(c, 10, specs)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -1e-2 * 0.5, rtol=1e-5)
    assert not np.any(updates["head"]["bias"])
    # Adam's first moment of a clipped gradient has at most (1 - beta1) of the clip norm.
    grads = jax.tree.map(lambda p: 100.0 * p, params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.global_norm(moment)) == pytest.approx(0.1, rel=1e-4)


def test_muon_moves_every_matrix_in_all_its_directions():
    """Updates of hidden matrices have equal singular values, those of a head its own."""
    specs = {"J": matrix("H D D"), "P": matrix("H Y D"), "V": matrix("V D")}
    shapes = {"J": (2, 8, 8), "P": (2, 4, 8), "V": (9, 8)}
    draw = np.random.default_rng(0).standard_normal
    grads = {n: jnp.asarray(draw(shape) ** 3, jnp.float32) for n, shape in shapes.items()}
    grads["V"] = jnp.sign(grads["V"])
    grads["J"] *= jnp.array([1e-3, 1.0])[:, None, None]
    params = jax.tree.map(jnp.zeros_like, grads)
    c = settings(name="muon", schedule="constant", warmup_steps=0, weight_decay=0.5)
    optimizer = optimizers.create_optimizer(c, 10, specs)
    update_by = jax.jit(optimizer.update)
    updates, _ = update_by(grads, optimizer.init(params), params)

    def spread(update):
        values = np.linalg.svd(update, compute_uv=False)
        return values.max() / values.min()

    size = c.learning_rate * optimizers.MUON_RMS
    for update in (*updates["J"], updates["P"].reshape(8, 8)):
        assert spread(update) < 3.0
        assert 0.6 * size < float(jnp.sqrt(jnp.mean(update**2))) < 1.4 * size
    assert spread(grads["P"].reshape(8, 8)) > 5.0
    np.testing.assert_allclose(jnp.abs(updates["V"]), jnp.abs(updates["V"]).max(), rtol=1e-3)
    zero, ones = params, jax.tree.map(jnp.ones_like, params)
    decayed, _ = update_by(zero, optimizer.init(params), ones)
    for name in ("J", "P"):
        np.testing.assert_allclose(decayed[name], -c.learning_rate * 0.5, rtol=1e-5)
    assert not np.any(decayed["V"]), "only what Muon moves decays"


def test_the_two_sides_of_a_matrix():
    sides_of: dict[str, tuple[int, tuple[int, ...]]] = {
        "D M": (0, (1,)),
        "D H Y": (0, (1, 2)),
        "H Y D": (2, (0, 1)),
        "H D D": (1, (2,)),
        "M M": (1, (0,)),
    }
    for letters, (one, others) in sides_of.items():
        for spec in (matrix(letters), stacked({"W": matrix(letters)})["W"]):
            behind = len(spec.axes) - len(letters.split())  # the axis of blocks in front
            sides = optimizers.hidden_matrices(spec)
            assert sides.reduction_axis == (one + behind,)
            assert sides.output_axis == tuple(axis + behind for axis in others)
    for letters in ("V D", "N D", "D V"):
        assert optimizers.hidden_matrices(matrix(letters)) is None
    assert optimizers.hidden_matrices(vector("M")) is None


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_what_an_optimizer_keeps_lies_where_its_parameter_lies(name):
    config = default_config().model
    config.update({"vocab_size": 12, "embed_dim": 8, "num_heads": 2, "num_distinct_layers": 2})
    model = create_model(config)
    optimizer = optimizers.create_optimizer(settings(name=name), 10, parameter_specs(model))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 2})

    def init():
        params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), zero, zero)

    state = jax.eval_shape(init)
    where = state_shardings(model, state, mesh)
    assert where.step.is_fully_replicated
    found = zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(where.optimizer), strict=True)
    split = [leaf.shape for leaf, place in found if not place.is_fully_replicated]
    moments = {"adamw": 2, "muon": 1}[name]  # of a hidden matrix
    assert split.count(state.params["block"]["attention"]["J"].shape) == moments
    assert split.count(state.params["head"]["kernel"].shape) == 2
