"""Parameters of the paper's PyTorch release, as models of this library."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from nrgpt_jax.array_types import Variables
from nrgpt_jax.configs import default_config
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import LanguageModel, create_model, parameter_shapes
from nrgpt_jax.models.names import is_nrgpt

StateDict = Mapping[str, np.ndarray]


def from_release(state_dict: StateDict, meta: Mapping[str, Any]) -> tuple[LanguageModel, Variables]:
    """Return the model and variables of a release checkpoint.

    Args:
      state_dict: the release's parameters by name, as numpy arrays; torch `Linear` weights are
        (out, in). Causal-mask and position buffers are ignored.
      meta: `model`, `n_embed`, `n_head`, `n_layer`, `block_size`, `vocab_size`,
        `strictly_causal`, `ff_hid_factor`.

    Returns:
      (model, variables) for `model.apply(variables, tokens)`.

    Raises:
      UserError: a parameter is missing, unused, or of another shape than `meta` implies.
    """
    model = create_model(release_config(meta))
    weights = {name: np.asarray(value) for name, value in state_dict.items()}
    reader = _Reader({name: w for name, w in weights.items() if not _is_buffer(name)})
    flat = {
        "token_embedding/embedding": reader.take("token_embedding_table.weight"),
        "position_embedding/embedding": reader.take("position_embedding_table.weight"),
        "final_norm/gain": reader.take("ln_f.weight"),
        "final_norm/bias": reader.take("ln_f.bias"),
        "head/kernel": reader.take("lm_head.weight").T,
        "head/bias": reader.take("lm_head.bias"),
    }
    read_block = _energy_block if is_nrgpt(meta["model"]) else _transformer_blocks
    flat |= {f"block/{name}": value for name, value in read_block(reader, meta).items()}
    reader.finish()
    return model, {"params": _checked(flat, model)}


def release_config(meta: Mapping[str, Any]) -> ConfigDict:
    """Return the configuration of the model that `meta` describes."""
    config = default_config()
    config.model.update(
        {
            "name": meta["model"],
            "vocab_size": meta["vocab_size"],
            "context_length": meta["block_size"],
            "embed_dim": meta["n_embed"],
            "num_heads": meta["n_head"],
            "num_steps": meta["n_layer"],
            "mlp_ratio": float(meta["ff_hid_factor"]),
            "mask": "strict" if meta["strictly_causal"] else "inclusive",
        }
    )
    return config


class _Reader:
    """A reader of parameters by name that detects missing and unused ones."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights

    def take(self, name: str) -> np.ndarray:
        if name not in self.weights:
            raise UserError(f"the checkpoint has no parameter {name}; is it of this model?")
        return self.weights.pop(name)

    def take_heads(self, pattern: str, count: int) -> np.ndarray:
        """Return the parameters of all heads, (H, out, in)."""
        return np.stack([self.take(pattern.format(head)) for head in range(count)])

    def finish(self) -> None:
        if self.weights:
            names = ", ".join(sorted(self.weights)[:5])
            raise UserError(f"the checkpoint has parameters that the model lacks: {names}")


def _is_buffer(name: str) -> bool:
    return bool(re.search(r"(^|\.)(tril|pos_idx)$", name))


def _energy_block(reader: _Reader, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # wei[A,B] = g_A . (H g_B), so J = H^T in this library's E = -log sum exp(g_B^T J g_A).
    heads = reader.take_heads("blocks.attn.heads.{}.H.weight", meta["n_head"])
    block = {
        "attention/J": heads.swapaxes(1, 2),
        "norm/bias": reader.take("blocks.ln.bias"),
        "rate/eta": reader.take("blocks.proj.weight"),
        "feedforward/scale": reader.take("blocks.scale_ff").reshape(()),
    }
    gain = reader.take("blocks.ln.weight")
    if not np.all(gain == 1.0):
        raise UserError("blocks.ln.weight is not 1: the release keeps the gain of this norm fixed")
    num_layers = 1 if meta["model"] == "NRGPT_H_FF1" else 2
    for i in range(num_layers):  # torch's (out, in) to (narrow, wide)
        weight = reader.take(f"blocks.ffwd.net.{2 * i}.weight")
        contracts = meta["model"] == "NRGPT_H_FF2W" and i == 1
        block[f"feedforward/W{i + 1}"] = weight if contracts else weight.T
        block[f"feedforward/b{i + 1}"] = reader.take(f"blocks.ffwd.net.{2 * i}.bias")
    return block


def _transformer_blocks(reader: _Reader, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if meta["model"] != "GPT":
        return _transformer_block(reader, "blocks.", meta["n_head"])
    layers = [
        _transformer_block(reader, f"blocks.{i}.", meta["n_head"]) for i in range(meta["n_layer"])
    ]
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def _transformer_block(reader: _Reader, prefix: str, num_heads: int) -> dict[str, np.ndarray]:
    block = {}
    for name in ("query", "key", "value"):
        heads = reader.take_heads(prefix + "sa.heads.{}." + name + ".weight", num_heads)
        block[f"attention/{name}"] = heads.transpose(2, 0, 1)  # (D,H,Y)
    projection = reader.take(prefix + "sa.proj.weight").T
    block["attention/projection"] = projection.reshape(num_heads, -1, projection.shape[1])
    block["attention/bias"] = reader.take(prefix + "sa.proj.bias")
    for ours, theirs in (("up", "ffwd.net.0"), ("down", "ffwd.net.2")):
        block[f"mlp/{ours}"] = reader.take(f"{prefix}{theirs}.weight").T
        block[f"mlp/{ours}_bias"] = reader.take(f"{prefix}{theirs}.bias")
    for ours, theirs in (("norm1", "ln1"), ("norm2", "ln2")):
        block[f"{ours}/gain"] = reader.take(f"{prefix}{theirs}.weight")
        block[f"{ours}/bias"] = reader.take(f"{prefix}{theirs}.bias")
    return block


def _checked(flat: Mapping[str, np.ndarray], model: LanguageModel) -> dict[str, Any]:
    expected = parameter_shapes(model)
    for name, value in flat.items():
        if expected[name] != value.shape:
            raise UserError(f"parameter {name} has shape {value.shape}, not {expected[name]}")
    params = {name: jnp.asarray(value, jnp.float32) for name, value in flat.items()}
    return traverse_util.unflatten_dict(params, sep="/")
