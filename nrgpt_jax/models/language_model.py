"""What every model here shares: embeddings in front, final LayerNorm and head behind."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchStates, Logits, PerSequence, StepKeys, Tokens, Variables
from nrgpt_jax.core import parameters
from nrgpt_jax.core.dynamics import RolloutOptions
from nrgpt_jax.core.parameters import Sizes, Table, constant, matrix, vector
from nrgpt_jax.core.step import State
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.kernels.layer_norm import layer_norm
from nrgpt_jax.models.decoding import Decoding

Cache = dict[str, jax.Array]
"""What is kept of past tokens, (T,B,S,...) by name; see `core.caches`."""

FINAL_NORM = {"gain": constant(1.0, "D"), "bias": vector("D")}


class LanguageModel(nn.Module):
    """Token and position embedding -> T steps of a block -> LayerNorm -> logits.

    A module declares parameters from tables and calls pure functions. Subclasses define
    `block_table`, `pair_flops`, `after`, `rollout_n`, `forward_cached` and `cache_row`. Residual
    states, the norms and the logits are kept in float32 whatever `dtype` is. The fields are those
    of `config.model`.
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
    num_distinct_layers: int = 1  # steps take them in turn

    # What a model is ------------------------------------------------------------------------------

    has_energy = False  # whether its tokens descend an energy: `energies`, `trajectory`

    @property
    def sizes(self) -> Sizes:
        """The length of every axis of its parameters."""
        width, rank = self.embed_dim, self.embed_dim // self.num_heads
        hidden = max(1, round(self.mlp_ratio * width))
        shape = {"T": self.num_steps, "N": self.context_length, "V": self.vocab_size}
        return Sizes(width, self.num_heads, rank, hidden, **shape, L=self.num_distinct_layers)

    @nn.nowrap
    def block_table(self) -> Table:
        """The parameters of one block."""
        raise TypeError(f"{type(self).__name__} does not define block_table")

    @nn.nowrap
    def pair_flops(self) -> float | None:
        """Operations a token and step of scores and averages over the context; None: unknown."""
        raise TypeError(f"{type(self).__name__} does not define pair_flops")

    @nn.nowrap
    def tables(self) -> dict[str, Table]:
        """All parameters of the model: what they are called, and what is known of them."""
        block = self.block_table()
        found: dict[str, Table] = {
            "token_embedding": {"embedding": matrix("V D", uses=0)},
            "position_embedding": {"embedding": matrix("N D", uses=0)},
            "block": parameters.stacked(block) if self.num_distinct_layers > 1 else block,
            "final_norm": FINAL_NORM,
        }
        if not self.tied_head:
            found["head"] = {"kernel": matrix("D V", uses=1), "bias": vector("V")}
        return found

    @nn.nowrap
    def with_num_steps(
        self, variables: Variables, num_steps: int
    ) -> tuple["LanguageModel", Variables]:
        """The model and its variables, with `num_steps` steps, which still use its layers in turn.

        Parameters of single steps go on with the last one.

        Raises:
          UserError: the model has a block of its own for every step, or there is no step.
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
    def with_kernels(self, choice: str) -> "LanguageModel":
        """The same model by other derivative rules, one of `kernels.CHOICES`, if it has any."""
        del choice
        return self

    # Parameters -----------------------------------------------------------------------------------

    def setup(self):
        init = lambda table: partial(parameters.init_params, table=table, sizes=self.sizes)
        self.stored = {name: self.param(name, init(table)) for name, table in self.tables().items()}

    @nn.nowrap
    def group_params(self, group: str) -> dict[str, Any]:
        """The parameters of one group, as functions are given them."""
        stored = flax.core.unfreeze(self.stored)[group]
        return parameters.constrain(stored, self.tables()[group], self.sizes)

    @nn.nowrap
    def layer_schedule(self, block: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """(inputs of the T steps, the block of a step from its inputs), for blocks in turn."""
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
        """Next-token logits (B,N,V) of tokens (B,N), N up to the context length.

        Args:
          tokens: integers below `vocab_size`.
          train: apply dropout; needs `rngs={"dropout": key}` when the rate is positive.
          rows: numbers (B,) of the sequences; what is dropped in one is a function of the key
            and its number, wherever it is computed. None: 0 to B - 1.
        """
        return self.readout(self.last_states(tokens, train, rows))

    def last_states(
        self, tokens: Tokens, train: bool = False, rows: PerSequence | None = None
    ) -> BatchStates:
        """The states (B,N,D) after the last step, of which `readout` makes the logits.

        Arguments are those of a call.
        """
        return self.rollout(tokens, RolloutOptions(), train, rows).x

    def rollout(
        self,
        tokens: Tokens,
        options: RolloutOptions,
        train: bool = False,
        rows: PerSequence | None = None,
    ) -> State:
        """The state after a rollout of at most T steps; other arguments are those of a call."""
        keys = None
        if train and self.dropout > 0.0:
            key = self.make_rng("dropout")
            of_row = lambda row: jax.random.split(jax.random.fold_in(key, row), self.num_steps)
            keys = jax.vmap(of_row, out_axes=1)(jnp.arange(len(tokens)) if rows is None else rows)
        return self.after(self.embed(tokens), options, keys)

    def embed(self, tokens: Tokens) -> BatchStates:
        """The states before the first step. Raises ValueError on too long a sequence."""
        count = tokens.shape[-1]
        if count > self.context_length:
            raise ValueError(f"{count} tokens do not fit the context length {self.context_length}")
        return self._embedded(tokens) + self._embedding("position_embedding")[None, :count]

    @nn.nowrap
    def _embedding(self, name: str) -> Float[Array, "rows D"]:
        return self.group_params(name)["embedding"]

    @nn.nowrap
    def _embedded(self, tokens: Int[Array | np.ndarray, "*B"]) -> Float[Array, "*B D"]:
        return jnp.take(self._embedding("token_embedding"), tokens, axis=0)

    def states(self, x: BatchStates) -> BatchStates:
        """The states after T steps from the first ones."""
        return self.after(x, RolloutOptions()).x

    def after(self, x: BatchStates, options: RolloutOptions, keys: StepKeys | None = None) -> State:
        """Where tokens with first states x are after a rollout, with dropout where there are keys.

        Only models with an energy can hold the context of a rollout.
        """
        raise TypeError(f"{type(self).__name__} does not define after")

    def rollout_n(self, tokens: Tokens, count: Int[Array, ""] | Int[Array, "B"]) -> State:
        """Where tokens are after any number of equal steps; without a gradient."""
        raise TypeError(f"{type(self).__name__} does not define rollout_n")

    def readout(self, x: BatchStates) -> Logits:
        """Logits (float32) of states; works on the states of any step.

        The product is of numbers in `dtype`; it is added up and returned in float32.
        """
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        with jax.named_scope("readout"):
            x = layer_norm(self.group_params("final_norm"), x).astype(self.dtype)
            if self.tied_head:
                embedding = self._embedding("token_embedding").astype(self.dtype)
                return product("bnd,vd->bnv", x, embedding)
            head = self.group_params("head")
            logits = product("bnd,dv->bnv", x, head["kernel"].astype(self.dtype))
            return logits + head["bias"][None, None]

    @nn.nowrap
    def readout_groups(self) -> tuple[str, ...]:
        """The groups of parameters that `readout` reads."""
        return "final_norm", "token_embedding" if self.tied_head else "head"

    # The making of text ---------------------------------------------------------------------------

    def cache_row(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is kept of one token, of one step."""
        raise TypeError(f"{type(self).__name__} does not define cache_row")

    @nn.nowrap
    def check_decoding(self, decoding: Decoding) -> None:
        """Raises UserError where the model cannot decode in this way."""
        if not self.has_energy and decoding != Decoding():
            raise UserError("this model has no energy: it has an exact cache and makes all steps")
        if self.num_distinct_layers > 1 and decoding != Decoding():
            raise UserError(
                f"{self.num_distinct_layers} layers have an energy and keys of their own: they "
                "make all steps, with cache=exact"
            )

    def forward_cached(
        self,
        x: BatchStates,
        cache: Cache,
        position: PerSequence | None,
        decoding: Decoding,
        active: Bool[Array, "B P"] | None = None,
    ) -> tuple[BatchStates, Cache, Int[Array, "B P"]]:
        """`states` of P tokens a sequence, with past tokens in a cache.

        Args:
          x: (B,P,D).
          cache: is written, and read where `position` is given.
          position: None: the tokens are the first P. (B,): P = 1, one token at its position.
          decoding: which cache, and when a token stops.
          active: tokens that are waited for; None: all.

        Returns:
          The states after the last step, the cache, and the number of steps of every token.
        """
        raise TypeError(f"{type(self).__name__} does not define forward_cached")

    def decode_scan(
        self,
        x: BatchStates,
        cache: Cache,
        decoding: Decoding,
        prompt: Int[Array, ""] | int = 0,
    ) -> tuple[BatchStates, Int[Array, "B N"]]:
        """`forward_cached` of one token after the other, each in the context of those before.

        Args:
          x: (B,N,D).
          cache: of N slots, those of the prompt filled.
          decoding: which cache, and when a token stops.
          prompt: so many tokens, of every sequence, stay where they are.

        Returns:
          The states after the last step, and the number of steps that every token made.
        """
        stay = lambda cache, x, at: (x, cache, jnp.zeros(x.shape[:2], jnp.int32))
        move = lambda cache, x, at: self.forward_cached(x, cache, at, decoding)

        def one(cache: Cache, given: tuple[jax.Array, jax.Array]):
            position, x = given
            at = jnp.full(len(x), position)
            x, cache, steps = jax.lax.cond(position >= prompt, move, stay, cache, x[:, None], at)
            return cache, (x[:, 0], steps[:, 0])

        body = one if self.remat == "none" else jax.checkpoint(one)
        given = jnp.arange(x.shape[1]), jnp.swapaxes(x, 0, 1)
        found = jax.lax.scan(body, cache, given)[1]
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), found)

    def empty_cache(self, batch: Any, slots: int, kind: str = "exact") -> Cache:
        """A cache for `slots` tokens of `batch` sequences, of a kind of `caches.CACHES`."""
        steps = 1 if kind == "fixed_point" else self.num_steps
        shape = lambda row: (steps, batch, slots, *row)
        return {name: jnp.zeros(shape(row), self.dtype) for name, row in self.cache_row().items()}

    def prefill(
        self, tokens: Tokens, lengths: PerSequence, cache: Cache, decoding: Decoding
    ) -> tuple[Float[Array, "B V"], Cache, Int[Array, "B P"]]:
        """Reads prompts (B,P), each `lengths` long, into a cache.

        Returns:
          The logits after the last token of each, the cache, the steps that tokens made.
        """
        active = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        x, cache, steps = self.forward_cached(self.embed(tokens), cache, None, decoding, active)
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
        """One more token in each sequence, at `position`: logits (B,V), the cache, the steps."""
        x = self._embedded(tokens) + jnp.take(
            self._embedding("position_embedding"), position, axis=0
        )
        waited_for = None if active is None else active[:, None]
        x, cache, steps = self.forward_cached(x[:, None], cache, position, decoding, waited_for)
        return self.readout(x)[:, 0], cache, steps[:, 0]
