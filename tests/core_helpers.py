"""Small random parameters and states for tests of the core."""

from functools import partial

import jax
import jax.numpy as jnp

from nrgpt_jax.core.dynamics import Dynamics
from nrgpt_jax.core.energies import ATTENTION, FEEDFORWARD
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.parameters import Sizes, init_parameters
from nrgpt_jax.core.rates import RATES

SIZES = Sizes(D=8, H=2, Y=3, M=12)


def random_like(key, params, size=0.2):
    """The same tree with noise of a size at which nothing is linear and no softmax saturated."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    new = [
        leaf + size * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(tree, new)


def parameters(key, specs, dtype=jnp.float32):
    """Drawn parameters, biases included."""
    return random_like(key, init_parameters(key, specs, dtype))


def attention_parameters(key, name, sizes=SIZES, dtype=jnp.float32):
    """Parameters of an attention energy, its alpha and beta positive and away from one."""
    params = parameters(key, ATTENTION[name].specs(sizes), dtype)
    alpha = jax.random.uniform(key, (sizes.H,), dtype, minval=0.5, maxval=1.5)
    return {**params, "alpha": alpha, "beta": alpha[0] + 0.2}


def make_dynamics(
    key,
    attention="full_rank",
    feedforward="FF2W",
    norm="layer_norm",
    rate="gamma",
    strict=False,
    sizes=SIZES,
    dtype=jnp.float32,
):
    """Random dynamics of the named parts."""
    keys = jax.random.split(key, 4)
    attend = partial(
        ATTENTION[attention].energy,
        attention_parameters(keys[0], attention, sizes, dtype),
        strict=strict,
    )
    feed = partial(
        FEEDFORWARD[feedforward].function,
        parameters(keys[1], FEEDFORWARD[feedforward].specs(sizes), dtype),
    )
    norm_params = parameters(keys[2], NORMS[norm].specs(sizes), dtype)
    rate_params = init_parameters(keys[3], RATES[rate].specs(sizes, 1.0), dtype)
    gain = norm_params.get("gain", jnp.ones(sizes.D, dtype))
    return Dynamics(
        energies={"attention": attend, "feedforward": lambda query, context: feed(query)},
        norm=partial(NORMS[norm].function, norm_params),
        eta=RATES[rate].eta(rate_params, gain),
    )
