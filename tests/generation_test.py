"""Generation: equal to a plain loop over the model, for prompts of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.generation import Sampling, filter_logits, generate, next_token

VOCAB, LENGTH = 11, 8


@pytest.fixture(scope="module")
def model_and_variables():
    config = default_config().model
    config.update({"vocab_size": VOCAB, "context_length": LENGTH, "embed_dim": 8, "num_steps": 2})
    model = create_model(config)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    # Large parameters, so that the text is not one repeated token.
    return model, jax.tree.map(lambda p: 30.0 * p, variables)


PROMPTS = [np.array([1]), np.array([2, 3, 4, 5, 6]), np.array([7, 8])]


def greedy_loop(model, variables, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        context = jnp.asarray(tokens[-LENGTH:])[None]
        tokens.append(int(jnp.argmax(model.apply(variables, context)[0, -1])))
    return tokens[len(prompt) :]


def test_greedy_is_the_plain_loop_also_past_the_context_length(model_and_variables):
    model, variables = model_and_variables
    found = generate(model, variables, PROMPTS, 12)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert new.tolist() == greedy_loop(model, variables, prompt, 12)
    assert len({tuple(new) for new in found}) == 3


def test_stops_at_the_end_token(model_and_variables):
    model, variables = model_and_variables
    whole = generate(model, variables, PROMPTS, 12)
    end = int(whole[0][4])
    for new, full in zip(
        generate(model, variables, PROMPTS, 12, end_token=end), whole, strict=True
    ):
        first = full.tolist().index(end) if end in full else 12
        assert new.tolist() == full[:first].tolist()


def test_seeds_repeat_and_differ(model_and_variables):
    model, variables = model_and_variables
    draw = lambda seed: generate(
        model, variables, [PROMPTS[0]] * 4, 12, sampling=Sampling(2.0), seed=seed
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    assert len({tuple(row) for row in draw(0)}) > 1, "samples of one prompt differ"


def test_long_prompts_keep_their_end(model_and_variables):
    model, variables = model_and_variables
    prompt = np.arange(20) % VOCAB
    (new,) = generate(model, variables, [prompt], 3)
    assert new.tolist() == greedy_loop(model, variables, prompt[-LENGTH:], 3)


def test_padding_of_the_vocabulary_is_never_drawn(model_and_variables):
    model, variables = model_and_variables
    draw = lambda n: generate(
        model, variables, PROMPTS, 12, sampling=Sampling(5.0), seed=1, num_symbols=n
    )
    free, held = np.concatenate(draw(None)), np.concatenate(draw(4))
    assert free.max() >= 4 > held.max()


def test_empty_prompts_are_refused(model_and_variables):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, variables, [np.array([], np.int32)], 3)


LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), 4),
        (Sampling(1.0, top_k=2), 2),
        (Sampling(1.0, top_k=9), 4),
        (Sampling(1.0, top_p=0.79), 2),
        (Sampling(1.0, top_p=0.81), 3),
        (Sampling(1.0, top_p=1e-6), 1),
        (Sampling(1.0, top_k=3, top_p=0.6), 2),
    ],
)
def test_top_k_and_top_p(sampling, kept):
    assert int(jnp.isfinite(filter_logits(LOGITS, sampling)).sum()) == kept


def test_temperature_sharpens():
    keys = jax.random.split(jax.random.key(0), 2000)
    share = lambda t: np.mean([
        next_token_batch(keys, Sampling(t)) == 0
    ])  # fmt: skip
    assert share(1.0) == pytest.approx(0.5, abs=0.05)
    sharp = 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    assert share(0.5) == pytest.approx(sharp, abs=0.05)
    assert share(0.0) == 1.0


def next_token_batch(keys, sampling):
    return np.asarray(jax.vmap(lambda key: next_token(key, LOGITS, sampling)[0])(keys))
