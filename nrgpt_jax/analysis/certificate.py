"""The guarantee of descent of a model, and the measurements on one text."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.core import certificates, evidence
from nrgpt_jax.core.certificates import Checks, Guarantee, Parts
from nrgpt_jax.core.evidence import Evidence
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.runs.pretrained import Pretrained

DRAWN = (0.3, 1.0, 3.0) * 2  # sizes of the random states of six tokens in a check


class Certificate(NamedTuple):
    """The guarantee of descent of a model, and the measurements on one text."""

    proposition: str | None  # see `certificates.guarantee`
    reason: str
    norm: str
    rate: str
    mask: str
    dtype: str  # of the model; the values below are computed in float32 or wider
    smallest_eigenvalue: float  # of the symmetric part of eta
    largest_eigenvalue: float
    contradicted: int  # number of token steps that begin uphill despite a guarantee
    uphill: float  # share of token steps that begin uphill, context held fixed
    rises: float  # share of token steps whose energy rises, context held fixed
    steps_converged: int  # number of token steps with a converged, non-empty context
    rises_converged: float  # share of these in which the energy rose; nan if there are none
    rises_converged_by_token: tuple[float, ...]  # the same by token, also with an empty context
    largest_step_scale: float  # largest multiple of the model's steps with descent at all


def certificate(trained: Pretrained, states: np.ndarray, measured: Evidence) -> Certificate:
    """Return the guarantee and the measurements.

    Args:
      trained: a model with energies.
      states: (T,N,D) states before every step of one text.
      measured: evidence of these steps.
    """
    model: Any = trained.model.bind(trained.variables)
    eta, strict = np.asarray(model.eta(), np.float32), model.strict
    exactly = jax.enable_x64(True), jax.numpy_dtype_promotion("standard")
    with exactly[0], exactly[1], jax.default_device(_cpu()):
        promise, contradicted = _promise(trained, eta, states)
    etas = eta if model.num_distinct_layers > 1 else [eta]
    spectrum = [certificates.symmetric_spectrum(one, model.embed_dim) for one in etas]
    converged, rose = measured.context_converged.sum(axis=0), measured.rises_converged.sum(axis=0)
    some = slice(1 if strict else 0, None)  # token 0 has an empty context under the strict mask
    share = lambda part, total: float(part) / float(total) if total else math.nan
    return Certificate(
        *promise,
        norm=model.norm,
        rate=model.inference_rate,
        mask=model.mask,
        dtype=model.dtype,
        smallest_eigenvalue=float(np.min(spectrum)),
        largest_eigenvalue=float(np.max(spectrum)),
        contradicted=contradicted,
        uphill=float(np.mean(measured.uphill)),
        rises=float(np.mean(measured.rises)),
        steps_converged=int(converged[some].sum()),
        rises_converged=share(rose[some].sum(), converged[some].sum()),
        rises_converged_by_token=tuple(map(share, rose, converged)),
        largest_step_scale=float(measured.largest_scales.min()),
    )


def _cpu() -> jax.Device | None:
    """Return a CPU device, since TPUs lack exact float64; None: the default device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _promise(trained: Pretrained, eta: np.ndarray, states: np.ndarray) -> tuple[Guarantee, int]:
    """Return the guarantee, and how many token steps contradict it, both computed in float64."""
    model: Any = trained.model.bind(trained.variables)
    names = zip(model.terms(), model.energy_names, strict=True)
    choices: dict[str, Any] = {"combination": model.combination, "rule": model.rule}
    choices |= {"strict": model.strict, "blocks": model.num_distinct_layers}
    choices |= {"line_search": model.line_search}
    parts = Parts(model.norm, np.asarray(model.gain()), eta, dict(names), **choices)
    wide = lambda array: jnp.asarray(np.asarray(array), jnp.float64)
    model = trained.model.with_implementation("autodiff").clone(dtype="float64")
    variables = jax.tree.map(wide, trained.variables)
    promise = certificates.certify(parts, partial(_checked, model, variables))
    if promise.proposition is None:
        return promise, 0
    deep, variables = model.with_num_steps(variables, len(states))
    return promise, int(np.sum(_uphill(deep, variables, wide(states))))


@partial(jax.jit, static_argnums=(0, 2))
def _checked(model: LanguageModel, variables, term: str | None) -> Checks:
    bound: Any = model.bind(variables)
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = jnp.asarray(DRAWN)[None, : model.context_length, None]
    first, x = (
        sizes * jax.random.normal(key, (1, sizes.shape[1], model.embed_dim), sizes.dtype)
        for key in keys[:2]
    )
    inputs, dynamics_at = bound.dynamics(first)
    dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
    return certificates.check(certificates.alone(dynamics, term) if term else dynamics, x, keys[2])


@partial(jax.jit, static_argnums=0)
def _uphill(model: LanguageModel, variables, states):
    bound: Any = model.bind(variables)
    inputs, dynamics_at = bound.dynamics(states[:1])
    return evidence.uphill_moves(dynamics_at, inputs, states[:, None])
