"""What tests of descent share: compiled trajectories with their evidence, and a toy well."""

import functools

import jax
import jax.numpy as jnp
from core_helpers import dynamics_of, term_of

from nrgpt_jax.core.descent import trajectory
from nrgpt_jax.core.evidence import evidence


def with_float64(test):
    """Energy changes of small steps drown in float32."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


@functools.cache
def follower(build, *choices):
    """A compiled `(key, number, scales) -> path, evidence, whatever else build returns`.

    `build` makes the dynamics of one sequence, whose axis is taken away here.
    """

    def follow(key, number, scales):
        model, *more = build(key, number, *choices)
        steps = (lambda _: model), {"scale": scales}
        path = trajectory(*steps)
        of_sequence = lambda tree: jax.tree.map(lambda a: a[:, 0], tree)
        return of_sequence(path), of_sequence(evidence(*steps, path)), *more

    return jax.jit(follow)


def follow(build, *choices, seed=0, number=1.0, scales=(1.0,)):
    """The trajectory of what `build` makes of a key, a number and choices, and its evidence."""
    numbers = jnp.asarray(number), jnp.asarray(scales)
    return follower(build, *choices)(jax.random.key(seed), *numbers)


def well(x, matrix, eta, rule="descent"):
    """Without a norm: E_A = |x_A - M x_(A-1)|^2 / 2, the minimum of token 0 is at 0."""

    def energy(params, g, context):
        is_before = jnp.arange(len(context.keys)) == context.position - 1
        before = jnp.sum(jnp.where(is_before[:, None], context.keys, 0), axis=0)
        return 0.5 * jnp.sum((g - params["M"] @ before) ** 2)

    term = term_of(energy, {"M": matrix}, has_keys=True, dtype=str(x.dtype))
    return dynamics_of({"well": term}, x[None], eta, strict=True, rule=rule)
