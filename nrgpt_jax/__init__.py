"""NRGPT in JAX: language models whose tokens roll down an energy landscape."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "create_model": "models",
    "generate": "generation",
    "Settings": "generation",
    "Convergence": "core.descent",
    "Sampling": "sampling",
    "log_likelihood": "scoring",
    "load_pretrained": "pretrained",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:  # imported on demand: configurations need no JAX
        return getattr(importlib.import_module(f"nrgpt_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
