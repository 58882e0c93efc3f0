"""Losses and scores some tokens at a time: the same numbers, without all logits at once."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import small_model
from marks import slow_but

from nrgpt_jax import log_likelihood
from nrgpt_jax.array_types import Batch
from nrgpt_jax.models import readout, sharding
from nrgpt_jax.training import evaluation, losses
from nrgpt_jax.training import step as training

ROWS, LENGTH, SYMBOLS = 4, 12, 30


def batch_of(rows=ROWS, symbols=SYMBOLS):
    tokens = (np.arange(rows * (LENGTH + 1)).reshape(rows, -1) * 7) % symbols
    weights = (tokens[:, 1:] % 4 > 0).astype(np.float32)
    return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), weights)


def at_once(monkeypatch, tokens, symbols=SYMBOLS):
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", tokens * symbols)


@pytest.mark.ci
@pytest.mark.parametrize("tied_head", slow_but([False], [False, True]))
def test_loss_and_gradients_are_those_of_all_tokens_at_once(tied_head, monkeypatch):
    model, variables = small_model(vocab_size=SYMBOLS, context_length=LENGTH, tied_head=tied_head)
    batch, rows = batch_of(), jnp.arange(ROWS)
    loss = partial(losses.summed_loss, model=model, batch=batch, rows=rows, key=jax.random.key(0))

    def found():
        jax.clear_caches()
        return jax.jit(jax.value_and_grad(partial(loss, scale=0.3), has_aux=True))(
            variables["params"]
        )

    wanted = found()
    at_once(monkeypatch, 7)  # 48 tokens: in parts that do not divide them
    chex.assert_trees_all_close(found(), wanted, rtol=1e-5, atol=1e-6)


def test_sums_and_scores_are_those_of_all_tokens_at_once(monkeypatch):
    model, variables = small_model(vocab_size=SYMBOLS, context_length=LENGTH)
    batch, texts = batch_of(), list(batch_of().inputs)

    def found():
        jax.clear_caches()
        sums = jax.jit(losses.batch_sums, static_argnums=1)(variables["params"], model, batch)
        return sums, log_likelihood(
            model, variables, [t[:5] for t in texts], [t[5:] for t in texts]
        )

    wanted = found()
    assert float(wanted[0]["weights"]) == batch.weights.sum()
    at_once(monkeypatch, 24)
    chex.assert_trees_all_close(found(), wanted, rtol=1e-5)


def temporaries(monkeypatch, symbols, rows):
    """Megabytes that training and evaluation need besides parameters, logits at most 2^16."""
    at_once(monkeypatch, 2**16 // symbols, symbols)
    model, _ = small_model(vocab_size=symbols, context_length=LENGTH, num_steps=1)
    mesh = sharding.make_mesh()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), "int32")))
    batch = Batch(*(jax.ShapeDtypeStruct((rows, LENGTH), t) for t in ("int32", "int32", "float32")))  # type: ignore[arg-type]
    found = []
    train = jax.jit(training.make_loss_and_grads(model, 1, mesh))
    programs: list[Any] = [
        (train, (jax.random.key(0), 1.0, 0)),
        (evaluation.make_eval_step(model, mesh), ()),
    ]
    for function, more in programs:
        compiled = function.lower(params["params"], batch, *more).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    """Logits of 1,536 tokens and 4,096 symbols would take 25 MB."""
    few, many = (temporaries(monkeypatch, symbols=4096, rows=rows) for rows in (16, 128))
    for before, after in zip(few, many, strict=True):
        assert after - before < 6, "states of more tokens alone"
