"""Parts of one's own, one of each kind, as a plugin of the tests."""

import jax
import jax.numpy as jnp
import numpy as np

import nrgpt_jax as nrgpt
from nrgpt_jax.core.norms import NORMS, Norm
from nrgpt_jax.core.rules import RATES, BoundRule, Rate, apply_rate
from nrgpt_jax.datasets import Dataset, Prompts
from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.datasets.tokenizers import SymbolTokenizer

SYMBOLS = ["<eos>", "=", "a", "b", "c"]


@nrgpt.feedforward("HOPFIELD", {"W": nrgpt.matrix("D K"), "b": nrgpt.vector("K")}, exact=True)
def hopfield(params, g, *, K: int = 32, power: float = 2.0):
    """E = -(1/power) sum relu(g W + b)^power, K memories."""
    del K  # the length of an axis
    return -jnp.sum(jax.nn.relu(g @ params["W"] + params["b"]) ** power) / power


@nrgpt.attention("cosine", {"J": nrgpt.matrix("H D D")}, exact=True)
def cosine(params, g, position):
    """q_h = J_h g / |J_h g|, k = g."""
    del position
    query = jnp.einsum("hed,d->he", params["J"], g)
    return query / (1e-3 + jnp.linalg.norm(query, axis=-1, keepdims=True))


@nrgpt.combination("weighted", {"weight": nrgpt.positive(1.0)}, exact=True)
def weighted(params, energies):
    """E = w sum_k E_k."""
    return params["weight"] * jnp.sum(energies)


NORMS.add(
    "halved",
    Norm(
        lambda params, x: x / (2.0 + params["gain"] * jnp.linalg.norm(x)),
        lambda params, x: jnp.linalg.norm(x),
        lambda x: jnp.linalg.norm(x),
        {"gain": nrgpt.constant(1.0, "D")},
    ),
)
RATES.add("tenth", Rate(lambda params, gain: 0.1 * gain, lambda size: {}, "nothing"))


@nrgpt.rule("damped", {}, follows="dE/dg")
def damped(params, eta, norm, *, damping: float = 0.5):
    """x <- x - damping eta dE/dg."""
    del params, norm
    move = lambda gradient, state, x: (-damping * apply_rate(eta, gradient), state)
    return BoundRule(lambda x: (), move)


@nrgpt.dataset("reverse")
def reverse(data, *, length: int = 3):
    """Words, `=`, and the word from behind."""
    del data
    random = np.random.default_rng(0)
    words = [random.integers(2, 5, length) for _ in range(200)]
    lines = [np.concatenate([word, [1], word[::-1], [0]]).astype(np.int32) for word in words]
    train, validation = np.concatenate(lines[:150]), np.concatenate(lines[150:])
    prompts = [np.append(word, 1).astype(np.int32) for word in words[150:160]]
    asked = Prompts(prompts, [word[::-1] for word in words[150:160]], 0, len(SYMBOLS), in_place)
    parts = Stream.of(train), Stream.of(validation), SymbolTokenizer(SYMBOLS)
    return Dataset(*parts, {"reverse": asked}, f"reverse-{length}")


def in_place(new, answer):
    """The share of symbols that stand where they should."""
    count = min(len(new), len(answer))
    return float(np.sum(new[:count] == answer[:count])) / len(answer)


@nrgpt.evaluator("confidence")
def confidence(model, params, batch):
    """The probability of the most probable token."""
    logits = model.apply({"params": params}, batch.inputs)
    return jnp.max(jax.nn.softmax(logits), axis=-1)


@nrgpt.evaluator("length_of_prompts", of="prompts")
def length_of_prompts(model, params, prompts):
    """Of the prompts, on average."""
    del model, params
    return np.mean([len(prompt) for prompt in prompts.prompts])


@nrgpt.metric("descent_rate")
def descent_rate(dynamics, out):
    """grad . move of every token."""
    del dynamics
    return jnp.sum(out.grad_g * out.move, axis=-1)
