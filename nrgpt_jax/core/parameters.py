"""Parameter tables: the name, shape, initializer, storage and use of every parameter.

Energies, norms, rates and rules are functions of a parameter dictionary. Each has a table
`name -> ParameterSpec`. It determines the parameters' shapes and initial values (here), the mesh
axes over which they are sharded (`models.sharding`), weight decay (`training.optimizers`) and FLOPs
(`models.flops`). None of these is inferred from a name or a shape. Initialization follows the
paper: N(0, 0.02) for matrices, 0 for biases.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.array_types import Key, Params

INIT_STD = 0.02
BLOCKS = "L"  # the leading axis of distinct blocks


class Sizes(NamedTuple):
    """The length of each axis, by its letter."""

    D: int  # embedding width
    H: int = 1  # heads
    Y: int = 1  # head rank (head width)
    M: int = 1  # feed-forward hidden width
    T: int = 1  # recurrent steps
    N: int = 1  # context length
    V: int = 1  # vocabulary
    L: int = 1  # distinct blocks
    options: Mapping[str, Any] = {}  # options of a model's parts: lengths of further axes by name

    def length(self, axis: str) -> int:
        """Return the length of an axis, given its letter or the name of an option."""
        return getattr(self, axis) if axis in _LETTERS else self.options[axis]


_LETTERS = frozenset(Sizes._fields) - {"options"}


class Bijector(NamedTuple):
    """The storage of a parameter: a prefix of its name, and the map to the constrained value."""

    prefix: str
    constrain: Callable[[jax.Array], jax.Array]


AS_IS = "as_is"
FIXED = "fixed"  # not stored: a constant
BIJECTORS: Mapping[str, Bijector] = {
    AS_IS: Bijector("", lambda stored: stored),
    "log": Bijector("log_", jnp.exp),
    "logit": Bijector("logit_", jax.nn.sigmoid),
}


class ParameterSpec(NamedTuple):
    """The axes, initializer, storage and use of one parameter."""

    axes: tuple[str, ...]  # each a letter of `Sizes`, or an option whose value is its length
    init: Callable[..., jax.Array]  # (key, shape, dtype) -> the stored value
    bijector: str = AS_IS  # one of BIJECTORS, or FIXED
    uses: int = 0  # number of products with a token in one forward step, for FLOPs

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape in a model of these sizes."""
        return tuple([sizes.length(axis) for axis in self.axes])

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes or more, not counting the axis of distinct blocks."""
        return len([letter for letter in self.axes if letter != BLOCKS]) >= 2

    def key(self, name: str) -> str:
        """Return the name under which it is stored: `log_beta` for a positive `beta`."""
        return BIJECTORS[self.bijector].prefix + name


Specs: TypeAlias = Mapping[str, ParameterSpec]
Table: TypeAlias = Mapping[str, Any]
"""Specs by name, possibly nested."""


def matrix(axes: str, uses: int = 2) -> ParameterSpec:
    """A matrix, or a stack of matrices, drawn from N(0, 0.02): `matrix("H D D")`.

    Args:
      axes: for each axis a letter of `Sizes`, or the name of an option that is its length.
      uses: number of products with a token per step; 2 for an energy and its gradient.
    """
    return ParameterSpec(_letters(axes), jax.nn.initializers.normal(INIT_STD), uses=uses)


def vector(axes: str) -> ParameterSpec:
    """A bias, initially zero."""
    return ParameterSpec(_letters(axes), jax.nn.initializers.zeros)


def constant(value: float, axes: str = "") -> ParameterSpec:
    """A gain, or a scalar if there are no axes, initially `value`."""
    return ParameterSpec(_letters(axes), jax.nn.initializers.constant(value))


def positive(value: float, axes: str = "") -> ParameterSpec:
    """A positive quantity, initially `value`, stored as its logarithm."""
    return ParameterSpec(_letters(axes), jax.nn.initializers.constant(float(np.log(value))), "log")


def fraction(value: float, axes: str = "") -> ParameterSpec:
    """A quantity between 0 and 1, initially `value`, stored as its logit."""
    logit = float(np.log(value / (1.0 - value)))
    return ParameterSpec(_letters(axes), jax.nn.initializers.constant(logit), "logit")


def fixed(value: float, axes: str = "") -> ParameterSpec:
    """A constant that is not learned."""
    return ParameterSpec(_letters(axes), jax.nn.initializers.constant(value), FIXED)


def _letters(axes: str) -> tuple[str, ...]:
    letters = tuple(axes.split())
    if BLOCKS in letters:
        raise ValueError(f"axes {axes!r}: {BLOCKS} is the axis of distinct blocks")
    return letters


def is_letter(axis: str) -> bool:
    """Whether an axis is a letter of `Sizes`."""
    return axis in _LETTERS


def own_axes(table: Table) -> set[str]:
    """Return the axes of a table that are names of options rather than letters of `Sizes`."""
    specs = jax.tree.leaves(table, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))
    return {axis for spec in specs for axis in spec.axes} - _LETTERS


def stacked(table: Table) -> Table:
    """Return the table of L distinct blocks, with a leading axis L for every parameter."""

    def stack(spec: ParameterSpec) -> ParameterSpec:
        if spec.bijector == FIXED:
            return spec._replace(axes=(BLOCKS, *spec.axes))

        def init(key, shape, dtype=jnp.float32):
            keys = jax.random.split(key, shape[0])
            return jax.vmap(lambda k: spec.init(k, shape[1:], dtype))(keys)

        return spec._replace(axes=(BLOCKS, *spec.axes), init=init)

    return {n: stack(s) if isinstance(s, ParameterSpec) else stacked(s) for n, s in table.items()}


def stored_specs(table: Table) -> dict[str, Any]:
    """Return the specs of the stored parameters, by the names under which they are stored."""
    result: dict[str, Any] = {}
    for name, spec in table.items():
        if not isinstance(spec, ParameterSpec):
            result[name] = stored_specs(spec)
        elif spec.bijector != FIXED:
            result[spec.key(name)] = spec
    return {name: spec for name, spec in result.items() if spec or isinstance(spec, ParameterSpec)}


def init_params(key: Key, specs: Table, sizes: Sizes, dtype=jnp.float32) -> dict[str, Any]:
    """Return the initial values of the parameters of `stored_specs`."""
    keys = jax.random.split(key, max(len(specs), 1))
    return {
        name: spec.init(k, spec.shape(sizes), dtype)
        if isinstance(spec, ParameterSpec)
        else init_params(k, spec, sizes, dtype)
        for k, (name, spec) in zip(keys, specs.items(), strict=False)
    }


def constrain(values: Mapping[str, Any], table: Table, sizes: Sizes) -> dict[str, Any]:
    """Return the constrained parameters of a table, by their own names."""
    result: dict[str, Any] = {}
    for name, spec in table.items():
        if not isinstance(spec, ParameterSpec):
            result[name] = constrain(values.get(name, {}), spec, sizes)
        elif spec.bijector == FIXED:
            result[name] = spec.init(None, spec.shape(sizes), jnp.float32)
        elif spec.bijector == AS_IS:
            result[name] = values[name]
        else:
            result[name] = BIJECTORS[spec.bijector].constrain(values[spec.key(name)])
    return result


def init_parameters(key: Key, specs: Specs, sizes: Sizes, dtype=jnp.float32) -> Params:
    """Return the initial parameters of one function, for use without Flax."""
    values = constrain(init_params(key, stored_specs(specs), sizes, dtype), specs, sizes)
    return {name: value.astype(dtype) for name, value in values.items()}
