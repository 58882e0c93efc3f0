"""Parameters of the paper's PyTorch release; see `nrgpt_jax.runs.release`."""

from nrgpt_jax.runs.release import from_release, release_config

__all__ = ["from_release", "release_config"]
