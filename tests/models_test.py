"""Models: sizes of the paper, heads, dropout, precision, context lengths."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import small_model
from marks import slow, slow_but

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import model_names

TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)


def build(**fields):
    return small_model(**{"context_length": 8, "num_steps": 2, **fields})


@pytest.mark.parametrize("name", slow_but(["NRGPT_H_FF2W", "GPT"], model_names()))
def test_shorter_contexts_are_prefixes_and_longer_ones_refused(name):
    model, variables = build(name=name)
    apply = jax.jit(model.apply)
    whole = apply(variables, TOKENS)
    chex.assert_trees_all_close(apply(variables, TOKENS[:, :5]), whole[:, :5], atol=1e-5)
    with pytest.raises(ValueError, match="9 tokens do not fit the context length 8"):
        model.apply(variables, jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize("name", ["NRGPT_H_FF2W", "GPT", "GPT_Rec_parallel"])
def test_dropout_only_in_training(name):
    """Which differs by key and by sequence."""
    model, variables = build(name=name, dropout=0.5)
    twice = jnp.stack([TOKENS[0], TOKENS[0]])
    train = jax.jit(lambda key: model.apply(variables, twice, train=True, rngs={"dropout": key}))
    one, same, two = train(jax.random.key(0)), train(jax.random.key(0)), train(jax.random.key(1))
    chex.assert_trees_all_equal(one, same)
    assert float(jnp.abs(one - two).max()) > 1e-3
    assert float(jnp.abs(one[0] - one[1]).max()) > 1e-4
    still = jax.jit(build(name=name, dropout=0.0)[0].apply)(variables, TOKENS)
    chex.assert_trees_all_close(jax.jit(model.apply)(variables, TOKENS), still, atol=1e-6)


@pytest.mark.parametrize("name", slow_but(["NRGPT_H_FF2W", "GPT"], model_names()))
def test_bfloat16_computation_keeps_float32_parameters(name):
    model, variables = build(name=name, dtype="bfloat16", size=0.02)
    created = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert {p.dtype for p in jax.tree.leaves(created)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, TOKENS)
    assert logits.dtype == jnp.float32
    exact = jax.jit(build(name=name)[0].apply)(variables, TOKENS)
    chex.assert_trees_all_close(logits, exact, atol=0.02)
    assert float(jnp.abs(logits - exact).max()) > 0.0, "it does compute in bfloat16"


def test_per_step_scale_scales_each_step():
    model, variables = build(name="NRGPT_H_FF2W", per_step_scale=True, num_steps=3)
    assert variables["params"]["steps"]["log_scale"].shape == (3,)
    silent = jnp.array([0.0, -50.0, -50.0])
    params = {**variables["params"], "steps": {"log_scale": silent}}
    trajectory = jax.jit(lambda p: model.apply({"params": p}, TOKENS, method="trajectory"))
    states = trajectory(params).states
    assert float(jnp.abs(states[1] - states[0]).max()) > 0.0
    chex.assert_trees_all_close(states[1], states[3])


@pytest.mark.parametrize("rule", [slow("descent"), "sphere"])
def test_a_rate_that_decays_brings_tokens_to_rest(rule):
    fields = {"name": "NRGPT_H_FF2W", "rule": rule, "inference_rate": "psd"}
    model, variables = build(**fields, inference_rate_decay=0.5, full_steps=2, num_steps=4)
    np.testing.assert_allclose(model.bind(variables).rates(), [1.0, 1.0, 0.5, 0.25])

    def states(steps, **changes):
        deeper, own = model.with_num_steps(variables, steps)
        deeper = deeper.clone(**changes)
        return jax.jit(lambda v: deeper.apply(v, TOKENS, method="forward")[0].x)(own)

    chex.assert_trees_all_close(states(2), states(2, inference_rate_decay=1.0), rtol=1e-6)
    moved = lambda a, b: float(jnp.abs(a - b).max())
    assert moved(states(3), states(3, inference_rate_decay=1.0)) > 1e-3
    assert moved(states(20), states(40)) < 1e-4
    assert moved(states(20, inference_rate_decay=1.0), states(40, inference_rate_decay=1.0)) > 1e-2


def test_learned_alpha_and_beta_start_at_their_settings():
    fields = {"name": "NRGPT_H_FF1", "beta": 0.5}
    fixed, variables = build(**fields)
    learned, _ = build(**fields, learn_alpha=True, learn_beta=True)
    more = jax.jit(learned.init)(jax.random.key(1), TOKENS)
    block = variables["params"]["block"]
    attention = {**more["params"]["block"]["attention"], **block["attention"]}
    assert set(attention) == {"J", "alpha", "log_beta"}
    params = {**variables["params"], "block": {**block, "attention": attention}}
    chex.assert_trees_all_close(
        jax.jit(learned.apply)({"params": params}, TOKENS),
        jax.jit(fixed.apply)(variables, TOKENS),
        atol=1e-6,
    )


def test_fields_that_are_not_given_have_their_defaults():
    few = create_model({"name": "NRGPT_H_FF2W", "vocab_size": 65})
    config = default_config().model
    config.vocab_size = 65
    assert few == create_model(config)
    for wrong in ({"vocab_size": 65, "widht": 8}, {"vocab_size": 65, "mask": "none"}):
        with pytest.raises(UserError):
            create_model(wrong)


def test_tabulate_prints_the_parameters():
    table = create_model({"vocab_size": 65, "context_length": 8, "embed_dim": 8}).tabulate(
        jax.random.key(0), jnp.zeros((1, 8), jnp.int32), console_kwargs={"width": 150}
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
    assert "embedding: float32[65,8]" in plain
    assert "J: float32[1,8,8]" in plain
    assert "uint32" not in plain, "letters of axes are no types"


def test_profiles_name_the_parts_of_a_step():
    model, variables = small_model()
    lowered = jax.jit(model.apply).lower(variables, jnp.zeros((1, 8), jnp.int32))
    text = lowered.as_text(debug_info=True)
    for scope in ("norm", "energies", "rule", "readout"):
        assert re.search(rf"\b{scope}/\w", text), scope
