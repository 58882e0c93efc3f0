"""NRGPT in JAX: language models whose tokens roll down an energy landscape."""

import importlib

from nrgpt_jax import interrupts

__version__ = "0.2.0"

if interrupts.is_program():  # Ctrl-C while its imports take their seconds
    interrupts.end_at_once()

_HOMES = {
    "create_model": "models",
    "generate": "generation.generate",
    "Settings": "generation.generate",
    "Convergence": "core.descent",
    "Sampling": "generation.sampling",
    "log_likelihood": "generation.scoring",
    "load_pretrained": "runs.pretrained",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:  # imported on demand: configurations need no JAX
        return getattr(importlib.import_module(f"nrgpt_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
