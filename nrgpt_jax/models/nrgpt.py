"""NRGPT: declares the parameters of the energies and lets `core.dynamics` do the mathematics."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nrgpt_jax.array_types import Key, Params, Tokens
from nrgpt_jax.core import dynamics as core
from nrgpt_jax.core import kernels
from nrgpt_jax.core.descent import Decoding, descend
from nrgpt_jax.core.energies import ATTENTION, FEEDFORWARD
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.parameters import Sizes, Specs, constant
from nrgpt_jax.core.rates import RATES
from nrgpt_jax.models.language_model import BatchStates, Cache, LanguageModel


class Parameters(nn.Module):
    """A dictionary of parameters declared from a table."""

    specs: Specs

    @nn.compact
    def __call__(self) -> Params:
        return {name: self.param(name, spec.init, spec.shape) for name, spec in self.specs.items()}


class NRGPT(LanguageModel):
    """Tokens descend an attention energy and a feed-forward energy for `num_steps` steps.

    The fields are those of `config.model`; `feedforward` names the feed-forward energy.
    """

    feedforward: str = "FF2W"
    attention: str = "full_rank"
    head_dim: int = 0
    mask: str = "inclusive"
    beta: float = 1.0
    learn_beta: bool = False
    learn_alpha: bool = False
    norm: str = "bare_layer_norm"
    rate: str = "full"
    rate_init: float = 1.0
    per_step_scale: bool = False
    kernels: str = "fused"

    @property
    def sizes(self) -> Sizes:
        """The widths D, H, Y and M."""
        rank = self.head_dim or self.embed_dim // self.num_heads
        return Sizes(self.embed_dim, self.num_heads, rank, self.mlp_ratio * self.embed_dim)

    def setup_block(self) -> None:
        attention_specs = dict(ATTENTION[self.attention].specs(self.sizes))
        if self.learn_alpha:
            attention_specs["alpha"] = constant(1.0, self.num_heads)
        if self.learn_beta:
            attention_specs["log_beta"] = constant(math.log(self.beta))
        scales = {"scale_ff": constant(1.0)}
        if self.per_step_scale:
            scales["log_step_scale"] = constant(0.0, self.num_steps)
        self.attention_params = Parameters(attention_specs)
        self.feedforward_params = Parameters(FEEDFORWARD[self.feedforward].specs(self.sizes))
        self.norm_params = Parameters(NORMS[self.norm].specs(self.sizes))
        self.rate_params = Parameters(RATES[self.rate].specs(self.sizes, self.rate_init))
        self.scales = Parameters(scales)

    def eta(self) -> jax.Array:
        """The inference rate: a scalar, a diagonal (D,) or a matrix (D,D), before any c_t."""
        return RATES[self.rate].eta(self.rate_params(), self.gain())

    def gain(self) -> jax.Array:
        """The gain (D,) of the norm, ones where it has none."""
        return self.norm_params().get("gain", jnp.ones(self.embed_dim))

    def step_scales(self) -> jax.Array:
        """c_t of every step, (T,)."""
        scales = self.scales()
        return jnp.exp(scales.get("log_step_scale", jnp.zeros(self.num_steps)))

    def states(self, x: BatchStates, train: bool) -> BatchStates:
        params, keys = self._parameters(), None
        if train and self.dropout > 0.0:
            keys = jax.random.split(self.make_rng("dropout"), self.num_steps)

        def dynamics_at(key):  # narrows parameters in each step: gradients add up in float32
            masks = () if key is None else self._dropout_masks(key, x.shape)
            return self._bind(params, self._attention_over_sequences(params, x.shape[0], *masks))

        last = core.rollout(
            dynamics_at,
            x.reshape(-1, self.embed_dim),
            self.step_scales(),
            keys,
            unroll=self.scan_unroll,
            remat=self.remat,
        )
        return last.reshape(x.shape)

    def dynamics(self, sequences: int = 1) -> core.Dynamics:
        """The energies, norm and rate of so many sequences of equal length, one after the other.

        For pure functions on states: `model.bind(variables).dynamics()`.
        """
        params = self._parameters()
        return self._bind(params, self._attention_over_sequences(params, sequences))

    def trajectory(self, tokens: Tokens) -> core.Trajectory:
        """The path of every sequence: states (B,T+1,N,D), and the same of what comes with them."""
        x = self.embed(tokens)
        dynamics = self.dynamics(x.shape[0])
        path = core.trajectory(dynamics, x.reshape(-1, self.embed_dim), self.step_scales())
        by_sequence = lambda leaf: jnp.swapaxes(
            leaf.reshape(len(leaf), *tokens.shape, *leaf.shape[2:]), 0, 1
        )
        return jax.tree.map(by_sequence, path)

    def energies(self, tokens: Tokens) -> dict[str, jax.Array]:
        """Per-step per-token energies, (T+1,B,N), under `attention`, `feedforward`, `total`."""
        return {k: jnp.swapaxes(e, 0, 1) for k, e in self.trajectory(tokens).energies.items()}

    def cache_row(self) -> dict[str, tuple[int, ...]]:
        """The shape of what is kept of a token, of one step: keys and values are one array."""
        params = self._cast(self._parameters()["attention"])
        g = jax.ShapeDtypeStruct((1, self.embed_dim), self.dtype)
        memory = ATTENTION[self.attention].memory
        return {"memory": jax.eval_shape(lambda g: memory(params, g), g).shape[1:]}

    def descend(
        self,
        x: BatchStates,
        cache: Cache,
        position: jax.Array | None,
        decoding: Decoding,
        active: jax.Array | None = None,
    ) -> tuple[BatchStates, Cache, jax.Array]:
        params = self._parameters()
        over_sequences = self._attention_over_sequences(params, x.shape[0])

        def bind(rows):
            over_rows = self._attention_over_rows(params, rows, position)
            return self._bind(params, over_sequences if position is None else over_rows)

        def remember(x_flat):
            g = NORMS[self.norm].function(params["norm"], x_flat).astype(self.dtype)
            memory = ATTENTION[self.attention].memory(self._cast(params["attention"]), g)
            return memory.reshape(*x.shape[:2], *memory.shape[1:])

        found = descend(
            bind,
            remember,
            x.reshape(-1, self.embed_dim),
            self.step_scales(),
            cache["memory"],
            position,
            decoding,
            None if active is None else active.reshape(-1),
            self.scan_unroll,
        )
        return (
            found.states.reshape(x.shape),
            {"memory": found.rows},
            found.steps.reshape(x.shape[:2]),
        )

    def _parameters(self) -> dict[str, Any]:
        """What `_bind` needs, read (or created) outside any JAX transformation."""
        attention = dict(self.attention_params())
        log_beta = attention.pop("log_beta", None)
        beta = jnp.asarray(self.beta) if log_beta is None else jnp.exp(log_beta)
        return {
            "attention": {"alpha": jnp.ones(self.num_heads), "beta": beta, **attention},
            "feedforward": self.feedforward_params(),
            "norm": self.norm_params(),
            "scale_ff": self.scales()["scale_ff"],
            "eta": self.eta(),
        }

    def _cast(self, tree):
        return jax.tree.map(lambda p: p.astype(self.dtype), tree)

    def _bind(self, params, attention_energy: core.EnergyTerm) -> core.Dynamics:
        """The dynamics of tokens with this attention energy."""
        feedforward = self._cast(params["feedforward"])
        feed = FEEDFORWARD[self.feedforward].function

        def feedforward_energy(query, context):
            del context
            with kernels.use(self.kernels):
                energy = feed(feedforward, query.astype(self.dtype))
            return params["scale_ff"] * energy.astype(params["scale_ff"].dtype)

        return core.Dynamics(
            energies={"attention": attention_energy, "feedforward": feedforward_energy},
            norm=partial(NORMS[self.norm].function, params["norm"]),
            eta=params["eta"].astype(self.dtype),
        )

    def _attention_over_sequences(
        self, params, sequences: int, keep_weights=None, keep_output=None
    ) -> core.EnergyTerm:
        """Of this many sequences of equal length, one after the other."""
        attention = self._cast(params["attention"])
        attend = partial(ATTENTION[self.attention].energy, strict=self.mask == "strict")

        def energy(query, context):
            if keep_output is not None:  # dropout of the gradient: same value, masked slope
                query = context + keep_output * (query - context)
            split = lambda g: g.astype(self.dtype).reshape(sequences, -1, self.embed_dim)
            each = jax.vmap(lambda q, c, keep: attend(attention, q, c, keep=keep))
            with kernels.use(self.kernels):
                return each(split(query), split(context), keep_weights).reshape(-1)

        return energy

    def _attention_over_rows(self, params, rows_BxSxC, position_B) -> core.EnergyTerm:
        """Of one token a sequence, at these positions, whose context is in a cache."""
        attention, strict = self._cast(params["attention"]), self.mask == "strict"
        attend = partial(ATTENTION[self.attention].function, attention, strict=strict)

        def energy(query, context):
            del context
            one = lambda g, rows, visible: attend(g[None], rows, visible=visible)[0]
            visible_B = position_B + (0 if strict else 1)
            return jax.vmap(one)(query.astype(self.dtype), rows_BxSxC, visible_B)

        return energy

    def _dropout_masks(self, key: Key, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Inverted dropout masks, of attention weights (B,H,N,N) and of their output (B*N,D)."""
        num_sequences, num_tokens, width = shape
        keep = 1.0 - self.dropout

        def mask(key, *shape):
            return jax.random.bernoulli(key, keep, shape).astype(jnp.float32) / keep

        of_weights, of_output = jax.random.split(key)
        weights = mask(of_weights, num_sequences, self.num_heads, num_tokens, num_tokens)
        return weights, mask(of_output, num_sequences * num_tokens, width)
