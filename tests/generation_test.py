"""Generation: equal to a plain loop over the model, for prompts of any length."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import next_logits

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.descent import Convergence
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation import decode as decoding
from nrgpt_jax.generation import generate as generation
from nrgpt_jax.generation.generate import Continuation, Settings, generate, stream
from nrgpt_jax.generation.sampling import Sampling, filter_logits, next_token, penalize, switches

KEY = jax.random.key(0)
VOCAB, LENGTH = 11, 8


@pytest.fixture(scope="module")
def model_and_variables():
    config = default_config().model
    config.update({"vocab_size": VOCAB, "context_length": LENGTH, "embed_dim": 8, "num_steps": 2})
    model = create_model(config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    # Large parameters, so that the text is not one repeated token.
    return model, jax.tree.map(lambda p: 30.0 * p, variables)


PROMPTS = [np.array([1]), np.array([2, 3, 4, 5, 6]), np.array([7, 8])]


@pytest.fixture(scope="module")
def made(model_and_variables):
    """`generate` by the model."""
    return partial(generate, *model_and_variables)


@pytest.fixture(scope="module")
def logits(model_and_variables):
    return next_logits(*model_and_variables)


def greedy_loop(logits, prompt, count, stride=1):
    """One token at a time, each from the whole context; a full one loses its oldest tokens."""
    tokens, context = [], list(prompt)
    for _ in range(count):
        tokens.append(int(logits(context).argmax()))
        context.append(tokens[-1])
        if len(context) > LENGTH:
            context = context[stride:]
    return tokens


@pytest.mark.parametrize("stride", [1, 3, LENGTH])
def test_greedy_is_the_plain_loop_also_past_the_context_length(made, logits, stride):
    expected = [greedy_loop(logits, prompt, 12, stride) for prompt in PROMPTS]
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        (found,) = made([prompt], 12, Settings(stride=stride))
        assert found.tokens.tolist() == tokens
    together = made(PROMPTS, 12, Settings(stride=stride))
    assert [new.tokens.tolist() for new in together] == expected
    assert len({tuple(new.tokens) for new in together}) == 3


def test_pieces_of_a_stream_are_the_whole(model_and_variables):
    model, variables = model_and_variables
    whole = generate(model, variables, PROMPTS, 12)
    pieces = list(stream(model, variables, PROMPTS, 12, tokens_at_once=4))
    assert [len(piece[1].tokens) for piece in pieces][:2] == [1, 3], "stops where one row is full"
    for row, new in enumerate(whole):
        for name in Continuation._fields:
            parts = np.concatenate([getattr(piece[row], name) for piece in pieces])
            np.testing.assert_array_equal(parts, getattr(new, name))


def test_log_probs_and_steps_are_those_of_the_model(made, logits):
    sampling = Sampling(temperature=3.0, top_k=4)
    for prompt, new in zip(PROMPTS, made(PROMPTS, 3, Settings(sampling)), strict=True):
        text = np.concatenate([prompt, new.tokens])
        at = range(len(prompt), len(text))
        expected = [jax.nn.log_softmax(logits(text[:i]))[text[i]] for i in at]
        np.testing.assert_allclose(new.log_probs, expected, atol=1e-4)
        assert new.steps.tolist() == [2, 2, 2]


def test_stops_at_the_end_token(made):
    whole = [new.tokens.tolist() for new in made(PROMPTS, 12)]
    end = whole[0][4]
    found = made(PROMPTS, 12, end_token=end)
    for new, full in zip(found, whole, strict=True):
        first = full.index(end) if end in full else 12
        assert new.tokens.tolist() == full[:first]
        assert len(new.log_probs) == len(new.steps) == first


def test_seeds_repeat_and_differ(made):
    settings = Settings(Sampling(temperature=2.0))
    draw = lambda seed: [new.tokens for new in made([PROMPTS[0]] * 4, 12, settings, seed=seed)]
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    assert len({tuple(row) for row in draw(0)}) > 1, "samples of one prompt differ"


def test_long_prompts_keep_their_end(made, logits):
    prompt = np.arange(20) % VOCAB
    (new,) = made([prompt], 3, Settings(stride=1))
    assert new.tokens.tolist() == greedy_loop(logits, prompt[-LENGTH:], 3)


def test_padding_of_the_vocabulary_is_never_drawn(made):
    settings = Settings(Sampling(temperature=5.0))
    draw = lambda n: np.concatenate(
        [c.tokens for c in made(PROMPTS, 12, settings, seed=1, num_symbols=n)]
    )
    assert draw(None).max() >= 4 > draw(4).max()


def test_calls_of_the_same_bucket_compile_once(made):
    made(PROMPTS, 5)
    programs: list[Any] = [decoding.read, decoding.decode_until]
    settings = Settings(Sampling(temperature=0.8, top_p=0.9, min_p=0.1, repetition_penalty=1.1))
    made(PROMPTS, 5, settings)
    before = [program._cache_size() for program in programs]
    others = [np.array([1, 2]), np.array([4, 4, 4]), np.array([5])]
    made(others, 4, seed=3)
    settings = Settings(Sampling(temperature=0.7, top_p=0.8, min_p=0.2, repetition_penalty=1.2))
    made(others, 4, settings, seed=3)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("prompts", "count", "settings", "message"),
    [
        ([np.array([], np.int32)], 3, Settings(), "a prompt is empty"),
        ([], 3, Settings(), "a prompt is empty"),
        (PROMPTS, 0, Settings(), "max_new_tokens"),
        ([np.array([1, 11])], 3, Settings(), "token 11 is not in the vocabulary of 11"),
        (PROMPTS, 4, Settings(overflow="refuse"), "5 tokens and 4 new ones do not fit .* 8"),
        (PROMPTS, 3, Settings(cache="big"), "cache='big' is not possible: choose one of exact"),
        (PROMPTS, 3, Settings(stride=9), "stride=9 .* between 1 and the context length 8"),
        (PROMPTS, 3, Settings(num_steps=0), "num_steps=0"),
        (PROMPTS, 3, Settings(stopping=Convergence(-1.0)), "tolerance=-1.0"),
        (PROMPTS, 3, Settings(stopping=Convergence(1.0, "luck")), "criterion='luck'"),
        (PROMPTS, 3, Settings(Sampling(temperature=-1.0)), "temperature=-1.0 is not possible"),
    ],
)
def test_mistakes_are_named(made, prompts, count, settings, message):
    with pytest.raises(UserError, match=message):
        made(prompts, count, settings)


def test_a_cache_too_large_is_refused_with_its_size(made, monkeypatch):
    monkeypatch.setattr(generation.host, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"cache of 3 x 8 tokens needs 0.0 GB and 0.0 GB are free"):
        made(PROMPTS, 5)
    made(PROMPTS[:1], 5, Settings(cache="fixed_point"))


# How a token is drawn ----------------------------------------------------------------------------

LOGITS, EQUAL = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), jnp.zeros((2, 50))


@pytest.mark.parametrize(
    ("logits", "settings", "kept"),
    [
        (LOGITS, {}, 4),
        (LOGITS, {"top_k": 2}, 2),
        (LOGITS, {"top_k": 9}, 4),
        (LOGITS, {"top_p": 0.79}, 2),
        (LOGITS, {"top_p": 0.81}, 3),
        (LOGITS, {"top_p": 1e-6}, 1),
        (LOGITS, {"top_k": 3, "top_p": 0.6}, 2),
        (LOGITS, {"min_p": 0.09}, 4),
        (LOGITS, {"min_p": 0.25}, 3),
        (LOGITS, {"min_p": 1.0}, 1),
        (LOGITS, {"min_p": 0.25, "temperature": 0.5}, 2),
        (EQUAL, {"top_k": 5}, 5),
        (EQUAL, {"top_p": 0.09}, 5),
    ],
)
def test_what_top_k_top_p_and_min_p_keep(logits, settings, kept):
    """Of equal tokens no more than asked for."""
    sampling = Sampling(**{"temperature": 1.0, **settings})
    kept_here = jnp.isfinite(filter_logits(logits, sampling, switches(sampling))).sum(axis=-1)
    assert kept_here.tolist() == [kept] * len(logits)


def test_repetition_penalty_acts_on_what_was_seen():
    logits, seen = jnp.array([[2.0, -1.0, 1.9]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(penalize(logits, seen, 2.0), [[1.0, -2.0, 1.9]])

    def draw(penalty):
        sampling = Sampling(repetition_penalty=penalty)
        return int(next_token(KEY, logits, sampling, switches(sampling), seen)[0])

    assert (draw(1.0), draw(1.1)) == (0, 2)


def test_repetition_penalty_sees_the_whole_context(made, logits):
    settings = Settings(Sampling(repetition_penalty=3.0))
    (new,) = made([np.array([1, 5])], LENGTH - 2, settings)
    text = [1, 5]
    for token in new.tokens:
        seen = np.isin(np.arange(VOCAB), text)[None]
        assert token == penalize(jnp.asarray(logits(text)[None]), jnp.asarray(seen), 3.0).argmax()
        text.append(int(token))


def test_temperature_sharpens():
    rows = jnp.repeat(LOGITS, 2000, axis=0)

    def share(temperature):
        sampling = Sampling(temperature=temperature)
        return np.mean(np.asarray(next_token(KEY, rows, sampling, switches(sampling))) == 0)

    assert share(1.0) == pytest.approx(0.5, abs=0.05)
    sharp = 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    assert share(0.5) == pytest.approx(sharp, abs=0.05)
    assert share(0.0) == 1.0
