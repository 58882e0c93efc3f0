"""The mathematics of the paper as pure functions: no Flax, no configuration, no hidden state."""

import nrgpt_jax.core.further_energies  # noqa: F401  # registers them
