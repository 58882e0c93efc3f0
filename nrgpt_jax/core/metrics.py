"""Step metrics, which training logs for every recurrent step: functions of a block's results.

    @metric("rate_of_descent")
    def rate_of_descent(dynamics, out):
        return jnp.sum(out.grad_g * out.move, axis=-1)

`config.step_metrics = ("rate_of_descent",)` then logs its mean over tokens for every step.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from nrgpt_jax import ops
from nrgpt_jax.array_types import BatchEnergies
from nrgpt_jax.core.block import Dynamics, EnergyAndGrad, context_of, energy_and_grad
from nrgpt_jax.registry import Registry

Metric = Callable[[Dynamics, EnergyAndGrad], BatchEnergies]
METRICS: Registry[Metric] = Registry("step metric")


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register a step metric `(dynamics, out) -> (B,N)`, selectable in `config.step_metrics`."""
    return METRICS.register(name, lambda function: function)


def record(
    names: Sequence[str], dynamics: Dynamics, out: EnergyAndGrad
) -> dict[str, BatchEnergies]:
    """Compute the named metrics."""
    return {name: METRICS[name](dynamics, out) for name in names}


@metric("energy")
def energy(dynamics: Dynamics, out: EnergyAndGrad) -> BatchEnergies:
    """E_A before the step."""
    del dynamics
    return out.total


@metric("energy_change")
def energy_change(dynamics: Dynamics, out: EnergyAndGrad) -> BatchEnergies:
    """The change of a token's energy by its own step, with its context held fixed."""
    x = out.x + out.move
    return energy_and_grad(dynamics, x, dynamics.norm.function(x), out.keys).total - out.total


@metric("attention_entropy")
def attention_entropy(dynamics: Dynamics, out: EnergyAndGrad) -> BatchEnergies:
    """The entropy of attention weights in nats, averaged over heads and attention energies.

    E = -(1/beta) sum_h alpha_h log Z_h(beta) is a free energy, so the entropy of its weights is
    beta^2 dE/dbeta = sum_h alpha_h S_h.
    """
    g, entropies = dynamics.norm.function(out.x), []
    for name, (entry, params, dtype, *_) in dynamics.terms.items():
        if entry.query is None:
            continue
        context = context_of(dynamics, out.x, g)._replace(keys=out.keys[name])

        def of_beta(beta, entry=entry, params=params, dtype=dtype, context=context):
            return entry.function({**params, "beta": beta}, g.astype(dtype), context)

        beta = params["beta"]
        with ops.implementation("autodiff"):
            slope = jax.jvp(of_beta, (beta,), (jnp.ones_like(beta),))[1]
        entropies.append(beta**2 * slope / jnp.sum(params["alpha"].astype(slope.dtype)))
    if not entropies:
        return jnp.zeros_like(out.total)
    return sum(entropies[1:], entropies[0]) / len(entropies)
