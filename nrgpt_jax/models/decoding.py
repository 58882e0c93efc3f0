"""How tokens descend while text is made: what a model is asked for."""

from typing import NamedTuple

from nrgpt_jax.core.dynamics import Convergence


class Decoding(NamedTuple):
    """Which cache is kept, and when a token stops."""

    cache: str = "exact"  # one of caches.CACHES
    until: Convergence | None = None  # None: every token makes all steps
