"""Faster forms of energies and norms, each registered for the definition that it replaces.

    kernel_of("FF2W", "fused")       a `core.terms.Kernel`, or None where there is none
    norm_kernel("layer_norm", "fused")   a norm of all tokens at once, likewise

- `fused`: closed-form derivatives, and for attention a kernel of the accelerator where it has
  one;
- `blocked`: closed forms in plain `jax.numpy` everywhere, with the same sums in the same order
  each time;
- `plain`: automatic differentiation of the definitions, which has forward mode and any order.

A kernel equals the plain form of its definition in values, first and second derivatives; the tests
compare all of them.
"""

from collections.abc import Callable

from nrgpt_jax.array_types import BatchStates, Params
from nrgpt_jax.core.registry import Registry
from nrgpt_jax.core.terms import Kernel
from nrgpt_jax.kernels import associative, feedforward
from nrgpt_jax.kernels.layer_norm import layer_norm

CHOICES = ("fused", "blocked", "plain")

KERNELS: Registry[Callable[[str], Kernel]] = Registry("kernel")
"""By the name of the energy: the kernel for a choice of `fused` or `blocked`."""


NORM_KERNELS: Registry[Callable[[Params, BatchStates], BatchStates]] = Registry("norm kernel")
"""By the name of the norm."""


def norm_kernel(norm: str, choice: str) -> Callable[[Params, BatchStates], BatchStates] | None:
    """The kernel `(params, x (B,N,D)) -> g` of a registered norm, if it has one."""
    return None if choice == "plain" else NORM_KERNELS.get(norm)


def kernel_of(energy: str, choice: str) -> Kernel | None:
    """The kernel of a registered energy; None where its definition is to be differentiated.

    Args:
      energy: its name.
      choice: one of `CHOICES`.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown kernels {choice!r}; known: {', '.join(CHOICES)}")
    return None if choice == "plain" or energy not in KERNELS else KERNELS[energy](choice)


def _attention(parts: associative.Parts) -> Callable[[str], Kernel]:
    return lambda choice: associative.kernel(parts, use_device=choice == "fused")


def _feedforward(energies: Callable) -> Callable[[str], Kernel]:
    return lambda choice: Kernel(energies)


NORM_KERNELS.add("layer_norm", layer_norm)
NORM_KERNELS.add("bare_layer_norm", layer_norm)
KERNELS.add("full_rank", _attention(associative.FULL_RANK))
KERNELS.add("full_rank_rope", _attention(associative.FULL_RANK_ROPE))
KERNELS.add("low_rank", _attention(associative.LOW_RANK))
KERNELS.add("low_rank_rope", _attention(associative.LOW_RANK_ROPE))
KERNELS.add("FF1", _feedforward(feedforward.ff1))
KERNELS.add("FF2", _feedforward(feedforward.ff2))
KERNELS.add("FF2W", _feedforward(feedforward.ff2w))
