"""Small models for tests of decoding."""

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets.tokenizers import SymbolTokenizer
from nrgpt_jax.models import abstract_params
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.runs.pretrained import Pretrained


def small_model(size=0.2, **fields):
    """A model and variables, large and random so that no path is near zero."""
    config = default_config().model
    config.update({"vocab_size": 11, "context_length": 12, "embed_dim": 8, "num_heads": 2})
    config.update({"num_steps": 3, **fields})
    model, random = create_model(config), np.random.default_rng(1)

    def draw(path, leaf):  # by numpy: nothing to compile
        one = path[-1].key in ("gain", "scale", "alpha")
        return jnp.asarray(one + size * random.standard_normal(leaf.shape), leaf.dtype)

    return model, {"params": jax.tree_util.tree_map_with_path(draw, abstract_params(model))}


def first_dynamics(bound, x):
    """What the first step of a bound model does to embedded tokens x (B,N,D)."""
    inputs, dynamics_at = bound.dynamics(x)
    return dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))


def next_logits(model, variables):
    """A function from a list of tokens to the logits after it, by the model on the whole."""
    apply = jax.jit(model.apply)

    def logits(tokens):
        padded = np.zeros((1, model.context_length), np.int32)  # one shape; causal
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply(variables, padded))[0, len(tokens) - 1]

    return logits


def cached_logits(model, variables, tokens, lengths, decoding=Decoding()):  # noqa: B008
    """Logits by cached decoding: of each row from the end of its prompt, the rest of it fed.

    Returns:
      A list of (logits (B,V), position (B,) that they follow, steps (B,)).
    """
    tokens, position = jnp.asarray(tokens), np.asarray(lengths) - 1
    batch, slots = tokens.shape
    call = jax.jit(
        lambda method, *args: model.apply(variables, *args, decoding, method=method),
        static_argnums=0,
    )
    cache = model.apply(variables, batch, slots, decoding.cache, method="empty_cache")
    prompts = tokens[:, : max(lengths)]
    logits, cache, steps = call("prefill", prompts, jnp.asarray(lengths), cache)
    rows = jnp.arange(batch)
    found = [(logits, position, steps[rows, position])]
    while position.max() + 1 < slots:
        position = position + 1
        logits, cache, steps = call(
            "decode", tokens[rows, position], jnp.asarray(position, jnp.int32), cache
        )
        found.append((logits, position, steps))
    return found


def pretrained(vocabulary="abcdefghijk", **fields) -> Pretrained:
    """A small model over the letters a to k, or other symbols."""
    model, variables = small_model(**fields)
    config = default_config()
    config.model.update(fields)
    return Pretrained(model, variables, SymbolTokenizer(vocabulary), config)
