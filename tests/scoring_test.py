"""Likelihoods, energies and cache errors against plain loops over the model."""

import jax
import numpy as np
import pytest
from decoding_helpers import small_model

from nrgpt_jax.core.descent import Convergence
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.scoring import (
    cache_error,
    log_likelihood,
    read_decoded,
    token_energies,
)
from nrgpt_jax.models.decoding import Decoding

LENGTH = 12


@pytest.fixture(scope="module")
def model_and_variables():
    return small_model(name="NRGPT_H_FF2W", context_length=LENGTH)


@pytest.fixture(scope="module")
def of_tokens(model_and_variables):
    """`tokens -> log-probabilities (N,V), total energies (N,)` by the model on the whole."""
    model, variables = model_and_variables

    @jax.jit
    def padded(tokens):
        log_p = jax.nn.log_softmax(model.apply(variables, tokens)[0])
        return log_p, model.apply(variables, tokens, method="energies")["total"][-1, 0]

    def of_tokens(tokens):
        whole = padded(np.pad(tokens, (0, LENGTH - len(tokens)))[None])  # one shape; causal
        return [np.asarray(array)[: len(tokens)] for array in whole]

    return of_tokens


def test_log_likelihood_is_the_sum_over_the_continuation(model_and_variables, of_tokens):
    model, variables = model_and_variables
    random = np.random.default_rng(0)
    sizes = [(1, 1), (4, 2), (11, 2), (3, 12), (30, 5)]
    pairs = [(random.integers(0, 11, a), random.integers(0, 11, b)) for a, b in sizes]
    found = log_likelihood(model, variables, *zip(*pairs, strict=True), batch_size=2)
    for (context, continuation), score in zip(pairs, found, strict=True):
        text = np.concatenate([context, continuation])[-LENGTH - 1 :]
        log_p = of_tokens(text[:-1])[0][-len(continuation) :]
        expected = log_p[np.arange(len(continuation)), continuation].sum()
        assert score.log_likelihood == pytest.approx(float(expected), rel=1e-4)
        assert score.is_greedy == bool((log_p.argmax(-1) == continuation).all())


def test_greedy_continuations_are_recognised(model_and_variables, of_tokens):
    model, variables = model_and_variables
    context = np.array([1, 2, 3])
    best = int(of_tokens(context)[0][-1].argmax())
    contexts, continuations = [context] * 2, [np.array([best]), np.array([(best + 1) % 11])]
    scores = log_likelihood(model, variables, contexts, continuations)
    assert [score.is_greedy for score in scores] == [True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood
    scores = log_likelihood(model, variables, [context], [np.array([best])], num_symbols=best + 1)
    wide = log_likelihood(model, variables, [context], [np.array([best])])
    assert scores[0].log_likelihood >= wide[0].log_likelihood, "padding has no probability"
    padding = log_likelihood(model, variables, [context], [np.array([10])], num_symbols=10)
    assert padding[0] == (-np.inf, False)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "is empty"),
        ([1], [], "is empty"),
        ([1], [11], "token 11 is not in"),
        ([1], [2] * 13, "13 tokens does not fit"),
    ],
)
def test_mistakes_are_named(model_and_variables, context, continuation, message):
    model, variables = model_and_variables
    pair = [np.array(context, int)], [np.array(continuation, int)]
    with pytest.raises(UserError, match=message):
        log_likelihood(model, variables, *pair)


@pytest.mark.parametrize("count", [5, 12, 31])
def test_energies_are_those_of_the_last_step(model_and_variables, of_tokens, count):
    model, variables = model_and_variables
    tokens = np.random.default_rng(1).integers(0, 11, count)
    found = token_energies(model, variables, tokens)
    assert found.shape == (count,)
    ends = {5: (0, 5), 12: (0, 12), 31: (18, 30)}  # a window, and the part of it that counts
    start, stop = ends[count]
    whole = of_tokens(tokens[start:stop])[1]
    overlap = LENGTH // 2 if start else 0
    np.testing.assert_allclose(found[start + overlap : stop], whole[overlap:], rtol=1e-4)


def test_cache_error_is_zero_of_an_exact_cache_and_not_of_another(model_and_variables):
    model, variables = model_and_variables
    tokens = np.random.default_rng(2).integers(0, 11, 20)
    exact = cache_error(model, variables, tokens, 3, Decoding())
    assert exact.largest < 1e-4
    assert exact.agreement == 1.0
    rough = cache_error(model, variables, tokens, 3, Decoding(cache="fixed_point"))
    assert rough.largest > 1e-3
    assert rough.divergence > 0


def test_texts_read_decoded_have_the_likelihoods_of_the_whole(model_and_variables, of_tokens):
    model, variables = model_and_variables
    texts = np.random.default_rng(3).integers(0, 11, (2, LENGTH + 1))
    exact = read_decoded(model, variables, texts, Decoding())
    for text, found in zip(texts, exact.log_probs, strict=True):
        expected = of_tokens(text[:-1])[0][np.arange(LENGTH), text[1:]]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (exact.steps == model.num_steps).all()
    rough = read_decoded(model, variables, texts, Decoding(cache="fixed_point"))
    assert np.abs(rough.log_probs[:, 0] - exact.log_probs[:, 0]).max() < 1e-4  # sees no other
    assert np.abs(rough.log_probs - exact.log_probs).max() > 1e-3
    hasty = read_decoded(model, variables, texts, Decoding(stopping=Convergence(1e9, "energy")))
    assert (hasty.steps < model.num_steps).all()


def test_texts_that_cannot_be_read_decoded_are_refused(model_and_variables):
    model, variables = model_and_variables
    for length in (1, LENGTH + 2):
        with pytest.raises(UserError, match="length of a text"):
            read_decoded(model, variables, np.ones((1, length), int), Decoding())
