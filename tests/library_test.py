"""The public API: light to import, and what it returns is what the model computes."""

import ast
import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoding_helpers import small_model
from pages_helpers import ROOT
from train_helpers import config_in, values

import nrgpt_jax as nrgpt
from nrgpt_jax.datasets import Dataset, load_recorded
from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.datasets.tokenizers import SymbolTokenizer, check_recordable
from nrgpt_jax.errors import UserError
from nrgpt_jax.training.step import TrainState

TOKENS = jax.random.randint(jax.random.key(0), (3, 9), 0, 11)


def test_importing_it_is_light():
    """No JAX, no backend; all names are there, and typed."""
    code = "import sys, nrgpt_jax; print('jax' in sys.modules, nrgpt_jax.default_config().seed)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "0"], done.stderr
    stub = ast.parse((ROOT / "nrgpt_jax/__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.name for node in imports for alias in node.names}
    assert typed == set(nrgpt.__all__) <= set(dir(nrgpt))
    assert all(getattr(nrgpt, name) is not None for name in nrgpt.__all__)


def test_loss_fn_is_the_mean_over_tokens():
    model, variables = small_model(name="NRGPT_H_FF2W")
    loss_fn = jax.jit(nrgpt.loss_fn, static_argnums=(0, 4))
    loss, aux = loss_fn(model, variables["params"], TOKENS, None, ("energy",))
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(variables, TOKENS[:, :-1]))
    each = -jnp.take_along_axis(log_p, TOKENS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, jnp.mean(each), rtol=1e-5)
    assert aux["num_tokens"] == each.size
    energies = jax.jit(lambda v: model.apply(v, TOKENS[:, :-1], method=model.energies))(variables)
    for t in range(model.num_steps):
        mean = jnp.mean(energies["total"][t])
        np.testing.assert_allclose(aux[f"energy/{t}"], mean, rtol=1e-4)
    weights = jnp.zeros((3, 8)).at[1, 2:5].set(1.0)
    batch = nrgpt.Batch(TOKENS[:, :-1], TOKENS[:, 1:], weights)
    part, aux = loss_fn(model, variables["params"], batch, None, ())
    np.testing.assert_allclose(part, jnp.mean(each[1, 2:5]), rtol=1e-5)
    assert aux["num_tokens"] == 3


def test_dropout_needs_a_key():
    model, variables = small_model(name="NRGPT_H_FF2W", dropout=0.5)
    loss_fn = jax.jit(lambda key: nrgpt.loss_fn(model, variables["params"], TOKENS, key)[0])
    still = small_model(name="NRGPT_H_FF2W")[0]
    expected = float(jax.jit(lambda v: nrgpt.loss_fn(still, v["params"], TOKENS)[0])(variables))
    assert float(loss_fn(None)) == pytest.approx(expected, rel=1e-5)
    assert float(loss_fn(jax.random.key(0))) != pytest.approx(expected, rel=1e-3)


def test_steps_by_hand_are_the_trajectory():
    model, variables = small_model(energies=("injection",), per_step_scale=True)

    @jax.jit
    def both(variables):
        bound = model.bind(variables)
        path, x, outs = bound.trajectory(TOKENS), bound.embed(TOKENS), list[Any]()
        first, xs = x, [x]
        for t in range(model.num_steps):
            x, out = bound.step(x, t, first)
            xs, outs = [*xs, x], [*outs, out]
        return path, jnp.stack(xs), outs, bound.gradients(TOKENS), bound.energies(TOKENS)

    bound = model.bind(variables)
    with pytest.raises(ValueError, match="step 3 of 3"):
        bound.step(bound.embed(TOKENS), 3)
    path, xs, outs, gradients, energies = both(variables)
    chex.assert_shape([path.states, path.grad_g, gradients], (4, 3, 9, 8))
    chex.assert_shape(energies["total"], (4, 3, 9))
    np.testing.assert_allclose(xs, path.states, rtol=1e-4, atol=1e-5)
    for t, out in enumerate(outs):
        np.testing.assert_allclose(out.grad_g, gradients[t], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(out.total, energies["total"][t], rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_could_not_be_opened_again_is_refused():
    own = SymbolTokenizer(["a"])
    own.kind = "mine"
    with pytest.raises(UserError, match="mine"):
        check_recordable(own)


def test_the_fields_of_a_model_are_keywords():
    model = nrgpt.create_model(name="NRGPT_H_FF1", vocab_size=7, num_steps=2)
    assert model == nrgpt.create_model({"name": "NRGPT_H_FF1", "vocab_size": 7, "num_steps": 2})
    assert nrgpt.create_model({"vocab_size": 7, "num_steps": 2}, num_steps=3).num_steps == 3
    with pytest.raises(ValueError, match="widht"):
        nrgpt.create_model(vocab_size=7, widht=3)


@pytest.mark.ci
def test_training_with_data_an_optimizer_and_hooks_of_ones_own(tmp_path, standard_promotion):
    """Which are used, and the run opens without them."""
    config = config_in(tmp_path)
    config.model.dropout = 0.0
    tokenizer = SymbolTokenizer(["a", "b", "c"])
    tokens = np.arange(400, dtype=np.int32) % 3
    own = Dataset(Stream.of(tokens), Stream.of(tokens[:99]), tokenizer, {}, "counting")
    seen: list = []
    hook = lambda step, metrics, state: seen.append((step, metrics, state))
    nrgpt.train(config, tmp_path / "run", dataset=own, optimizer=optax.sgd(0.0), hooks=[hook])
    lines = values(tmp_path / "run")
    assert [step for step, _, _ in seen] == [line["step"] for line in lines]
    losses = [metrics["val/loss"] for _, metrics, _ in seen if "val/loss" in metrics]
    assert losses[0] == losses[-1], "a learning rate of 0"
    states = [state for _, metrics, state in seen if "val/loss" in metrics]
    assert all(isinstance(state, TrainState) for state in states)
    trained = nrgpt.load_pretrained(tmp_path / "run")
    assert trained.tokenizer.decode([0, 1]) == "a,b"
    [new] = nrgpt.generate(trained.model, trained.variables, [np.array([0])], 3, num_symbols=3)
    assert len(new.tokens) == 3
    with pytest.raises(UserError, match="hand it over again"):
        load_recorded(trained.config.data)
