"""Small random parameters, states and dynamics for tests of the core."""

import jax
import jax.numpy as jnp

from nrgpt_jax.core.block import COMBINATIONS, Dynamics, bind
from nrgpt_jax.core.context import Context, over_contexts, over_tokens
from nrgpt_jax.core.energies import ENERGIES, Energy
from nrgpt_jax.core.norms import NORMS, bind_norm
from nrgpt_jax.core.parameters import Sizes, init_parameters
from nrgpt_jax.core.rules import RATES, RULES

SIZES = Sizes(D=8, H=2, Y=4, M=12)


def random_like(key, params, size=0.2):
    """The same tree with noise of a size at which nothing is linear and no softmax saturated."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    new = [
        leaf + size * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(tree, new)


def parameters(key, specs, dtype=jnp.float32, sizes=SIZES):
    """Drawn parameters, biases included."""
    return random_like(key, init_parameters(key, specs, sizes, dtype))


def energy_parameters(key, name, dtype=jnp.float32, sizes=SIZES):
    """Parameters of an energy; alpha, beta and other sizes positive and away from one."""
    params = parameters(key, ENERGIES[name].specs, dtype, sizes)
    return {n: jnp.abs(p) if n in ("alpha", "beta", "size") else p for n, p in params.items()}


def dynamics_of(
    terms,
    x,
    eta,
    *,
    norm="none",
    norm_params=None,
    strict=False,
    rule="descent",
    combination="sum",
    implementation="fused",
):
    """Dynamics of terms, of the sequences x (B,N,D)."""
    bound = bind_norm(norm, norm_params or {}, implementation)
    made = RULES[rule].make({"mu": jnp.asarray(0.5, x.dtype)}, eta, bound)
    tau = {"tau": jnp.asarray(0.7, x.dtype)}
    how = COMBINATIONS[combination], tau, implementation
    return Dynamics(terms, bound, made, x, strict, None, *how)


def term_of(function, params=None, has_keys=False, dtype="float64"):
    """A term of an energy of one token, `(params, g, context) -> ()`, that is not registered."""
    key = over_tokens(lambda params, g, position: g) if has_keys else None
    return bind(Energy(over_contexts(function), {}, "energy", key), params or {}, dtype)


def make_dynamics(
    key,
    x,
    energies=("full_rank", "FF2W"),
    norm="layer_norm",
    rate="gamma",
    strict=False,
    sizes=SIZES,
    implementation="fused",
    change=lambda eta: eta,
    **choices,
):
    """Random dynamics of the named parts, of the sequences x (B,N,D)."""
    keys, dtype = jax.random.split(key, len(energies) + 2), x.dtype
    terms = {
        ENERGIES[name].label: bind(
            ENERGIES[name],
            energy_parameters(k, name, dtype, sizes),
            str(dtype),
        )
        for k, name in zip(keys, energies, strict=False)
    }
    norm_params = parameters(keys[-2], NORMS[norm].specs, dtype, sizes)
    rate_params = init_parameters(keys[-1], RATES[rate].specs(1.0), sizes, dtype)
    gain = norm_params.get("gain", jnp.ones(sizes.D, dtype))
    eta = change(RATES[rate].eta(rate_params, gain))
    options = {"norm": norm, "norm_params": norm_params, "strict": strict}
    return dynamics_of(terms, x, eta, **options, implementation=implementation, **choices)


def context_of(name, params, g, strict):
    """Of tokens g (B,N,D) that are their own context; x and x0 are drawn from g."""
    position = jnp.broadcast_to(jnp.arange(g.shape[1])[None], g.shape[:2])
    key = ENERGIES[name].key
    keys = None if key is None else key(params, g, position)
    own = 2.0 * g, jnp.flip(g, axis=1), 0.5 * jnp.sum(g**2, axis=-1), g
    return Context(keys, strict, position, *own, aligned=True)


def of_token(context, sequence, token):
    """The context of one token."""
    keys = jax.tree.map(lambda leaf: leaf[sequence], context.keys)
    own = jax.tree.map(lambda leaf: leaf[sequence, token], context[2:7])
    return Context(keys, context.strict, *own)
