"""Which derivative rules are in use.

    with kernels.use("plain"):
        jax.hessian(energy)

- `fused`: closed forms, and for attention a kernel of the accelerator where it has one;
- `blocked`: closed forms in plain `jax.numpy` everywhere, with the same sums in the same order
  each time;
- `plain`: automatic differentiation of the definitions, which has forward mode and any order.

The choice is read while a function is traced. Of nested choices the later in this list stands, so
inside `plain` everything is plain, also a model configured otherwise.
"""

import contextlib
import contextvars
from collections.abc import Iterator

KERNELS = ("fused", "blocked", "plain")
_chosen = contextvars.ContextVar("kernels", default="fused")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Chooses one of `KERNELS` for what is traced inside."""
    if name not in KERNELS:
        raise ValueError(f"unknown kernels {name!r}; known: {', '.join(KERNELS)}")
    token = _chosen.set(max(name, chosen(), key=KERNELS.index))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str:
    """The one of `KERNELS` that is in use."""
    return _chosen.get()


def plain() -> bool:
    """Whether plain automatic differentiation is chosen."""
    return chosen() == "plain"
