"""Which derivative rules are in use: the fast ones, or plain automatic differentiation.

    with kernels.use("plain"):
        jax.hessian(energy)

The fast rules cannot be differentiated in forward mode; the plain definitions can, to any order.
The choice is read while a function is traced. Inside `plain` everything is plain, also a model
configured otherwise.
"""

import contextlib
import contextvars
from collections.abc import Iterator

KERNELS = ("fused", "plain")
_chosen = contextvars.ContextVar("kernels", default="fused")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Chooses `fused` or `plain` for what is traced inside; an outer `plain` stands."""
    if name not in KERNELS:
        raise ValueError(f"unknown kernels {name!r}; known: {', '.join(KERNELS)}")
    token = _chosen.set("plain" if plain() else name)
    try:
        yield
    finally:
        _chosen.reset(token)


def plain() -> bool:
    """Whether plain automatic differentiation is chosen."""
    return _chosen.get() == "plain"
