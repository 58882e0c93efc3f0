"""The README is short, its block is the model's, and its energy trains."""

import jax
import jax.numpy as jnp
import numpy as np
from decoding_helpers import small_model
from pages_helpers import PAGES, blocks, registered_here

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config

README = PAGES["README.md"]


def example_with(text: str) -> str:
    (example,) = (block for block in blocks("README.md", "python") if text in block)
    return example


def test_it_is_short():
    assert len(README.splitlines()) <= 130


def test_the_block_is_that_of_the_model(standard_promotion):
    """From the states before every step, with the parameters of the default model."""
    del standard_promotion
    names: dict = {}
    exec(compile(example_with("def block("), "README.md", "exec"), names)
    assert default_config().model.name == "NRGPT_H_FF2W"
    model, variables = small_model(num_steps=3)
    groups = variables["params"]["block"]
    params: dict = {}
    for name in ("attention", "feedforward", "norm", "rate"):
        params.update(groups[name])
    tokens = jnp.arange(7)[None] % 11
    states = jax.jit(lambda v, t: model.apply(v, t, method="trajectory").states)(variables, tokens)
    states = states[:, 0]
    block = jax.jit(names["block"])
    moved = [block(params, x) for x in states[:-1]]
    np.testing.assert_allclose(moved, states[1:], atol=2e-5)
    assert float(jnp.abs(states[1:] - states[:-1]).max()) > 0.1, "and they move"


def test_the_energy_example_trains():
    """Run as it stands; the model that it names then goes down its loss."""
    with registered_here():
        exec(compile(example_with("@nrgpt.feedforward"), "README.md", "exec"), {})
        assert "--config.model.name=NRGPT_H_TANH" in README
        config = default_config().model
        config.update({"name": "NRGPT_H_TANH", "vocab_size": 5, "embed_dim": 16})
        model = create_model(config)
        tokens = jnp.arange(40).reshape(1, 40) % 5
        params = jax.jit(model.init)(jax.random.key(0), tokens)

        @jax.jit
        def loss_and_grads(params):
            def loss_fn(params):
                log_p = jax.nn.log_softmax(jnp.asarray(model.apply(params, tokens[:, :-1])))
                return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1))

            return jax.value_and_grad(loss_fn)(params)

        first, grads = loss_and_grads(params)
        of_energy = grads["params"]["block"]["feedforward"]
        assert all(float(jnp.abs(grad).max()) > 0.0 for grad in of_energy.values())
        params = jax.jit(lambda p, g: jax.tree.map(lambda p, g: p - 0.1 * g, p, g))(params, grads)
        assert float(loss_and_grads(params)[0]) < float(first), "a small step downhill"
        energies = jax.jit(lambda p: model.apply(p, tokens, method="energies"))(params)
        assert bool(jnp.all(jnp.isfinite(energies["feedforward"])))
