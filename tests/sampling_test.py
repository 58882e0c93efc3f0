"""Drawing a token: a symbol that may be drawn, and the most probable one in every limit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.sampling import Sampling, check_sampling, next_token, penalize, switches

SYMBOLS = 6
DRAWS = 8
TINY = st.sampled_from((1e-50, 1e-45, 1e-39, 1e-38, 1.2e-38, 1e-30, 1e-6))


def draw(logits, sampling, seen=None):
    """Tokens drawn from some logits, as generation draws them: numbers are float32."""
    check_sampling(sampling)
    numbers = jax.tree.map(np.float32, sampling)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1))
    marks = None if seen is None else jnp.tile(jnp.asarray(seen), (DRAWS, 1))
    return np.asarray(next_token(jax.random.key(0), rows, numbers, switches(sampling), marks))


NUMBERS = st.one_of(st.integers(-40, 40).map(float), st.sampled_from((np.inf, -np.inf, 0.0)))
LOGITS = st.lists(NUMBERS, min_size=SYMBOLS, max_size=SYMBOLS)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), TINY, st.floats(1e-6, 1e6)),
    top_k=st.sampled_from((0, 1, 3, SYMBOLS, 10**6)),
    top_p=st.one_of(st.just(1.0), TINY, st.floats(1e-6, 1.0)),
    min_p=st.one_of(st.sampled_from((0.0, 1.0)), TINY, st.floats(0.0, 1.0)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(1e-6, 1e6)),
)


@given(logits=LOGITS, sampling=SAMPLINGS, seen=st.lists(st.booleans(), min_size=6, max_size=6))
@example(logits=[0.0] * 6, sampling=Sampling(1e-39), seen=[False] * 6)
@example(logits=[0.0, 1.0, 2.0, 3.0, 2.0, 1.0], sampling=Sampling(1e-50), seen=[False] * 6)
@example(logits=[-np.inf] * 6, sampling=Sampling(1.0), seen=[True] * 6)
@settings(max_examples=150, deadline=None)
def test_what_is_drawn_may_be_drawn_and_is_the_first_in_the_limits(logits, sampling, seen):
    tokens = draw(logits, sampling, seen)
    assert ((tokens >= 0) & (tokens < SYMBOLS)).all()
    numbers = jnp.asarray(logits, jnp.float32)[None]
    penalty: Any = np.float32(sampling.repetition_penalty)
    after = np.asarray(penalize(numbers, jnp.asarray(seen)[None], penalty))[0]
    possible = after[tokens] > -np.inf
    assert possible.all() or not np.isfinite(after).any(), "a token of no probability"
    limits = sampling.temperature <= 1e-30, sampling.top_p <= 1e-30, sampling.min_p == 1.0
    if any(limits) or sampling.top_k == 1:
        assert (after[tokens] == after.max()).all()


def test_equal_logits_are_drawn_alike():
    for value in (-np.inf, -1e30, 0.0, 1e30, np.inf):
        rows = jnp.full((400, 3), value, jnp.float32)
        numbers = jax.tree.map(np.float32, Sampling(0.7))
        tokens = next_token(jax.random.key(1), rows, numbers, switches(Sampling(0.7)))
        assert np.bincount(np.asarray(tokens), minlength=3).min() > 60, value


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1e-9},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-9},
    ],
)
def test_what_is_out_of_range_is_refused(fields):
    with pytest.raises(UserError) as error:
        check_sampling(Sampling(1.0)._replace(**fields))
    assert next(iter(fields)) in str(error.value)
