"""NRGPT in JAX: language models whose tokens roll down an energy landscape."""

__version__ = "0.1.0"

__all__ = ["create_model"]


def __getattr__(name: str):
    if name == "create_model":  # imported on demand: configurations need no JAX
        from nrgpt_jax.models import create_model

        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
