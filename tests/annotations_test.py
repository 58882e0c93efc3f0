"""Annotations are checked while tests run, those of inner functions too."""

import jax.numpy as jnp
import pytest
from annotations import checked
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

from nrgpt_jax.ops import causal_mask


def vectors():
    @jaxtyped(typechecker=checked)
    def inner(x: Float[Array, "n"]) -> Float[Array, "n"]:
        return x if x.shape == (2,) else x[:, None]

    return inner


def test_a_wrong_shape_is_found_in_the_package():
    with pytest.raises(TypeCheckError):
        causal_mask(jnp.zeros(3), 3, strict=True)


def test_an_inner_function_is_checked_whenever_it_is_defined():
    for _ in range(3):
        assert vectors()(jnp.zeros(2)).shape == (2,)
        with pytest.raises(TypeCheckError, match="the parameters of"):
            vectors()(jnp.zeros((2, 3)))
        with pytest.raises(TypeCheckError, match="the return value of"):
            vectors()(jnp.zeros(3))


def test_a_check_is_made_once_for_an_inner_function_and_its_annotations():
    def made(hint):
        def inner(x):
            return x

        inner.__annotations__["x"] = hint
        return checked(inner)

    assert made(Float[Array, "n"]) is made(Float[Array, "n"])
    assert made(Float[Array, "n"]) is not made(Float[Array, "n m"])
