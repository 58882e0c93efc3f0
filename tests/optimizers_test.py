"""Schedules have their named shapes; weight decay touches matrices only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.parameters import matrix, vector
from nrgpt_jax.models import model_names, parameter_specs
from nrgpt_jax.training import optimizers

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


def test_no_warmup_starts_at_the_peak():
    rate = optimizers.learning_rate_schedule(settings(warmup_steps=0), 100)
    assert float(rate(0)) == pytest.approx(1e-2, rel=1e-3)


MATRICES = {"embedding", "kernel", "J", "W1", "W2", "eta", "W", "up", "down"}
MATRICES |= {"query", "key", "value", "projection"}


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("name", model_names())
def test_weight_decay_on_matrices_or_on_all(name, blocks):
    fields = {"learn_alpha": True, "learn_beta": True, "per_step_scale": True, "blocks": blocks}
    fields |= {"name": name, "energies": ("injection", "leak"), "combination": "mixture"}
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
