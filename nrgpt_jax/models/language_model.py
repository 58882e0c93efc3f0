"""The base class of all models: embeddings, T steps of a block, final LayerNorm and head."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax import ops
from nrgpt_jax.array_types import BatchStates, Logits, PerSequence, StepKeys, Tokens, Variables
from nrgpt_jax.core import parameters
from nrgpt_jax.core.block import Dynamics, EnergyAndGrad, State, Step, rollout
from nrgpt_jax.core.norms import layer_norm
from nrgpt_jax.core.parameters import Sizes, Table, constant, matrix, vector
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.models.decoding import Decoding, forward_cached

Cache = dict[str, Any]
"""The KV cache: arrays (T,B,S,...) by name; see `core.block`."""
Record = Callable[[Dynamics, EnergyAndGrad], Any]
"""A function of the dynamics and the results of a step for all tokens."""

FINAL_NORM = {"gain": constant(1.0, "D"), "bias": vector("D")}


class LanguageModel(nn.Module):
    """Token and position embedding -> T steps of a block -> LayerNorm -> logits.

    A module declares parameters from tables and calls pure functions. Subclasses define
    `block_table`, `pair_flops`, `steps` and `cache_row`. Residual states, norms and logits are kept
    in float32 for any `dtype`. The fields are those of `config.model`.
    """

    vocab_size: int
    context_length: int
    embed_dim: int
    num_heads: int
    num_steps: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    tied_head: bool = False
    dtype: str = "float32"
    scan_unroll: int = 1
    remat: str = "none"
    num_distinct_layers: int = 1  # used by the steps in turn
    implementation: str = "fused"

    # Definition -----------------------------------------------------------------------------------

    steps: ClassVar[Callable[..., tuple[State, Any, Step]]]
    """`(x, position, cache, dropout_keys, record)`, all but x optional, to the arguments of
    `block.rollout`: the state before the first step, the inputs of the T steps, and the step."""

    has_energy = False  # whether tokens descend an energy: `energies`, `trajectory`

    @property
    def sizes(self) -> Sizes:
        """The length of every parameter axis."""
        width, rank = self.embed_dim, self.embed_dim // self.num_heads
        hidden = max(1, round(self.mlp_ratio * width))
        shape: Any = {"T": self.num_steps, "N": self.context_length, "V": self.vocab_size}
        return Sizes(width, self.num_heads, rank, hidden, **shape, L=self.num_distinct_layers)

    @nn.nowrap
    def block_table(self) -> Table:
        """The parameters of one block."""
        raise TypeError(f"{type(self).__name__} does not define block_table")

    @nn.nowrap
    def pair_flops(self) -> float:
        """FLOPs per token and step of scores and averages over the context."""
        raise TypeError(f"{type(self).__name__} does not define pair_flops")

    @nn.nowrap
    def tables(self) -> dict[str, Table]:
        """Return the parameter tables of the model, by group."""
        block = self.block_table()
        groups: dict[str, Table] = {
            "token_embedding": {"embedding": matrix("V D", uses=0)},
            "position_embedding": {"embedding": matrix("N D", uses=0)},
            "block": parameters.stacked(block) if self.num_distinct_layers > 1 else block,
            "final_norm": FINAL_NORM,
        }
        if not self.tied_head:
            groups["head"] = {"kernel": matrix("D V", uses=1), "bias": vector("V")}
        return groups

    @nn.nowrap
    def with_num_steps(
        self, variables: Variables, num_steps: int
    ) -> tuple["LanguageModel", Variables]:
        """Return the model and variables with `num_steps` steps, which use its layers in turn.

        Further steps have the per-step parameters of the last one.

        Raises:
          UserError: every step of the model has its own block, or `num_steps` is not positive.
        """
        require(num_steps > 0, "num_steps", num_steps, "at least 1")
        if num_steps == self.num_steps:
            return self, variables
        if 1 < self.num_distinct_layers == self.num_steps:
            raise UserError(
                f"the model has {self.num_distinct_layers} distinct layers and makes "
                f"{self.num_steps} steps; models that use a layer more than once can make more or "
                "fewer"
            )
        params = dict(variables["params"])
        for group, table in self.tables().items():
            for name, spec in parameters.stored_specs(table).items():
                if getattr(spec, "axes", ())[:1] == ("T",):
                    old = params[group][name]
                    new = old[jnp.minimum(jnp.arange(num_steps), len(old) - 1)]
                    params[group] = {**params[group], name: new}
        return self.clone(num_steps=num_steps), {**variables, "params": params}

    @nn.nowrap
    def with_implementation(self, name: str) -> "LanguageModel":
        """Return the same model with another of `ops.IMPLEMENTATIONS`."""
        return self.clone(implementation=name)

    # Parameters -----------------------------------------------------------------------------------

    def setup(self):
        tables, sizes = self.tables(), self.sizes
        specs, init = parameters.stored_specs(tables), parameters.init_params
        stored = {name: self.param(name, init, specs[name], sizes) for name in specs}
        self.constrained = parameters.constrain(stored, tables, sizes)

    @nn.nowrap
    def group_params(self, group: str) -> dict[str, Any]:
        """Return the constrained parameters of one group."""
        return flax.core.unfreeze(self.constrained)[group]

    @nn.nowrap
    def layer_schedule(self, block: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """Return the inputs of the T steps, and a function from those of a step to its block."""
        if self.num_distinct_layers == 1:
            return {}, lambda inputs_t: block
        if self.num_distinct_layers == self.num_steps:
            return {"block": block}, lambda inputs_t: inputs_t["block"]
        turn = jnp.arange(self.num_steps) % self.num_distinct_layers
        of = lambda inputs_t: jax.tree.map(lambda leaf: leaf[inputs_t["turn"]], block)
        return {"turn": turn}, of

    # The forward pass -----------------------------------------------------------------------------

    def __call__(
        self, tokens: Tokens, train: bool = False, rows: PerSequence | None = None
    ) -> Logits:
        """Return the next-token logits (B,N,V) of tokens (B,N); arguments as in `forward`."""
        return self.readout(self.forward(tokens, train, rows)[0].x)

    def forward(
        self,
        tokens: Tokens | BatchStates,
        train: bool = False,
        rows: PerSequence | None = None,
        *,
        record: Record | None = None,
    ) -> tuple[State, Any]:
        """Return the state after T steps, whose x `readout` maps to logits, and the records.

        Args:
          tokens: (B,N) integers below `vocab_size`, N up to the context length; or their embeddings
            by `embed`, (B,N,D).
          train: apply dropout; needs `rngs={"dropout": key}` when the rate is positive.
          rows: (B,) numbers of the sequences; the key and the number determine the dropout of a
            sequence, on any device. None: 0 to B - 1.
          record: function `(dynamics, out)` to a tree of arrays, for models with an energy; records
            have axis T in front.
        """
        x: Any = tokens if tokens.ndim == 3 else self.embed(tokens)
        keys = self.dropout_keys(len(x), train, rows)
        state, inputs, step = self.steps(x, dropout_keys=keys, record=record)
        return rollout(step, state, inputs, unroll=self.scan_unroll, remat=self.remat)

    @nn.nowrap
    def dropout_keys(self, batch: int, train: bool, rows: PerSequence | None) -> StepKeys | None:
        """Return the dropout keys of every step and sequence; None without dropout."""
        if not train or self.dropout == 0.0:
            return None
        key = self.make_rng("dropout")
        of_row = lambda row: jax.random.split(jax.random.fold_in(key, row), self.num_steps)
        return jax.vmap(of_row, out_axes=1)(jnp.arange(batch) if rows is None else rows)

    def embed(self, tokens: Tokens, position: PerSequence | None = None) -> BatchStates:
        """Return the states before the first step. Raises ValueError if the sequence is too long.

        Args:
          tokens: (B,N).
          position: None: tokens are at 0 to N-1. (B,): positions of single tokens, N = 1.
        """
        count = tokens.shape[-1]
        if count > self.context_length:
            raise ValueError(f"{count} tokens do not fit the context length {self.context_length}")
        x = jnp.take(self._embedding("token_embedding"), tokens, axis=0)
        of_positions = self._embedding("position_embedding")
        if position is None:
            return x + of_positions[None, :count]
        return x + jnp.take(of_positions, position, axis=0)[:, None]

    @nn.nowrap
    def _embedding(self, name: str) -> Float[Array, "rows D"]:
        return self.group_params(name)["embedding"]

    def readout(self, x: BatchStates) -> Logits:
        """Return the logits (float32) of states, which may be those of any step.

        The product has factors in `dtype`; it accumulates and returns float32.
        """
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        with jax.named_scope("readout"), ops.implementation(self.implementation):
            x = layer_norm(self.group_params("final_norm"), x).astype(self.dtype)
            if self.tied_head:
                embedding = self._embedding("token_embedding").astype(self.dtype)
                return product("bnd,vd->bnv", x, embedding)
            head = self.group_params("head")
            logits = product("bnd,dv->bnv", x, head["kernel"].astype(self.dtype))
            return logits + head["bias"][None, None]

    @nn.nowrap
    def readout_groups(self) -> tuple[str, ...]:
        """Return the parameter groups that `readout` reads."""
        return "final_norm", "token_embedding" if self.tied_head else "head"

    # Decoding -------------------------------------------------------------------------------------

    def cache_row(self) -> Any:
        """Return the cache of one token in one step: a tree of `jax.ShapeDtypeStruct`, by name."""
        raise TypeError(f"{type(self).__name__} does not define cache_row")

    def empty_cache(self, batch: Any, slots: int, kind: str = "exact") -> Cache:
        """Return a cache for `slots` tokens of `batch` sequences, of a kind in `block.CACHES`."""
        steps = 1 if kind == "fixed_point" else self.num_steps
        zeros = lambda row: jnp.zeros((steps, batch, slots, *row.shape), row.dtype)
        return jax.tree.map(zeros, self.cache_row())

    def prefill(
        self, tokens: Tokens, lengths: PerSequence, cache: Cache, decoding: Decoding
    ) -> tuple[Float[Array, "B V"], Cache, Int[Array, "B P"]]:
        """Prefill a cache with prompts (B,P), each `lengths` long.

        Returns:
          The logits after each last token, the cache, and the number of steps of every token.
        """
        active = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        x, cache, steps = forward_cached(self, tokens, cache, None, decoding, active)
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
        return self.readout(last)[:, 0], cache, steps

    def decode(
        self,
        tokens: PerSequence,
        position: PerSequence,
        cache: Cache,
        decoding: Decoding,
        active: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache, Int[Array, "B"]]:
        """Decode one token per sequence, at `position`: logits (B,V), cache, number of steps."""
        waited_for = None if active is None else active[:, None]
        token = jnp.asarray(tokens)[:, None]
        x, cache, steps = forward_cached(self, token, cache, position, decoding, waited_for)
        return self.readout(x)[:, 0], cache, steps[:, 0]
