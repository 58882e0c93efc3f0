"""What is logged of every recurrent step is what its words say, and can be extended."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoding_helpers import small_model

from nrgpt_jax.array_types import Batch
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.block import start
from nrgpt_jax.core.descent import energy_in_context
from nrgpt_jax.core.metrics import METRICS, metric
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import sharding
from nrgpt_jax.training import losses, step
from nrgpt_jax.training.config_checks import check_config

TOKENS = np.random.default_rng(0).integers(0, 11, (4, 8)).astype(np.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((4, 7), np.float32))


def aux_of(model, variables, names):
    """Metrics of three recurrent steps, means over the batch."""
    options = model, BATCH, jnp.arange(4), jax.random.key(0), 1.0 / BATCH.weights.sum()
    loss = partial(losses.summed_loss, step_metrics=names)
    return jax.jit(lambda params: loss(params, *options)[1])(variables["params"])


@pytest.mark.ci
def test_energy_is_that_of_the_trajectory_and_its_change_that_of_the_step_alone():
    model, variables = small_model(name="NRGPT_H_FF2W", num_steps=3, mask="strict")
    found = aux_of(model, variables, ("energy", "energy_change"))
    bound = model.bind(variables)
    path = bound.trajectory(jnp.asarray(BATCH.inputs))
    inputs, dynamics_at = bound.dynamics(path.states[0])
    dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
    state = start(dynamics)
    for t in range(3):
        energy = path.energies["total"][t]
        np.testing.assert_allclose(found[f"energy/{t}"], jnp.mean(energy), rtol=1e-4)
        at = energy_in_context(dynamics, state._replace(x=path.states[t]))
        change = at(path.states[t + 1]) - energy
        np.testing.assert_allclose(found[f"energy_change/{t}"], jnp.mean(change), rtol=1e-3)


@pytest.mark.parametrize("attention", ["full_rank", "low_rank_rope"])
def test_attention_entropy_is_that_of_the_weights(attention):
    fields = {"num_steps": 1, "mask": "inclusive", "attention": attention, "beta": 0.7}
    model, variables = small_model(name="NRGPT_H_FF2W", **fields)
    found = aux_of(model, variables, ("attention_entropy",))
    bound = model.bind(variables)
    x = bound.embed(jnp.asarray(BATCH.inputs))
    inputs, dynamics_at = bound.dynamics(x)
    dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
    entry, params, *_ = dynamics.terms["attention"]
    g, position = dynamics.norm.function(x), jnp.broadcast_to(jnp.arange(7)[None], (4, 7))
    query, key = entry.query(params, g, position), entry.key(params, g, position)
    key = key if key.ndim == 4 else jnp.broadcast_to(key[:, :, None], query.shape)
    scores = 0.7 * jnp.einsum("bnhe,bkhe->bhnk", query, key)
    weights = jax.nn.softmax(jnp.where(jnp.tri(7)[None, None] > 0, scores, -jnp.inf), axis=-1)
    entropy = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(weights), 0.0), axis=-1)
    np.testing.assert_allclose(found["attention_entropy/0"], jnp.mean(entropy), rtol=1e-4)


@pytest.mark.ci
def test_one_of_ones_own_is_logged_by_a_training_step(standard_promotion):
    del standard_promotion

    @metric("slope")
    def slope(dynamics, out):
        return jnp.sum(out.grad_g * out.move, axis=-1)

    try:
        model, _ = small_model(name="NRGPT_H_FF2W", num_steps=2)
        mesh, optimizer = sharding.make_mesh(None, jax.devices()[:1]), optax.sgd(0.1)
        logged = {}
        for parts in (1, 2):
            train_step = step.make_train_step(model, optimizer, 0, parts, mesh, None, ("slope",))
            logged[parts] = train_step(step.create_state(model, optimizer, 0, mesh), BATCH)[1]
    finally:
        METRICS.remove("slope")
    assert {"train/slope/0", "train/slope/1", "train/loss"} <= set(logged[1])
    np.testing.assert_allclose(logged[2]["train/slope/1"], logged[1]["train/slope/1"], rtol=1e-4)


def test_they_do_not_change_the_gradient():
    model, variables = small_model(name="NRGPT_H_FF2W", num_steps=2)
    options = model, BATCH, jnp.arange(4), jax.random.key(0), 1.0, 0, None
    of = lambda names: jax.jit(jax.grad(lambda p: losses.summed_loss(p, *options, names)[0]))
    with_, without = (of(names)(variables["params"]) for names in (tuple(METRICS), ()))
    for a, b in zip(*map(jax.tree.leaves, (with_, without)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [
        {"step_metrics": ("entropy",)},
        {"step_metrics": ("energy",), "model.name": "GPT"},
        {"step_metrics": ("energy",), "depth.loss_steps": 2},
    ],
)
def test_what_cannot_be_logged_is_refused(fields):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match="step_metrics"):
        check_config(config, 1)
