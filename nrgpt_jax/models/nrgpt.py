"""NRGPT: declares the parameters of energies, norm, rate and rule for `core.step`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchStates, PerSequence, RowKeys, StepKeys, Tokens
from nrgpt_jax.core import dynamics as core
from nrgpt_jax.core.combinations import COMBINATIONS
from nrgpt_jax.core.contexts import CausalMask
from nrgpt_jax.core.energies import ENERGIES, Energy
from nrgpt_jax.core.norms import NORMS, bind_norm
from nrgpt_jax.core.parameters import Sizes, Specs, Table, constant, fixed, positive
from nrgpt_jax.core.rates import RATES
from nrgpt_jax.core.rules import RULES
from nrgpt_jax.core.step import (
    Dropout,
    Dynamics,
    State,
    assemble,
    held_step,
    in_states,
    start,
    update_cache,
)
from nrgpt_jax.core.step import step as one_step
from nrgpt_jax.core.terms import bind
from nrgpt_jax.kernels import kernel_of, norm_kernel
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.models.language_model import Cache, LanguageModel


class NRGPT(LanguageModel):
    """Tokens descend the sum (or another combination) of energies for `num_steps` steps.

    The fields are those of `config.model`; `energy_names` are of `core.energies.ENERGIES`.
    """

    energy_names: tuple[str, ...] = ("full_rank", "FF2W")
    combination: str = "sum"
    head_dim: int = 0
    mask: str = "inclusive"
    beta: float = 1.0
    learn_beta: bool = False
    learn_alpha: bool = False
    norm: str = "bare_layer_norm"
    inference_rate: str = "full"
    inference_rate_init: float = 1.0
    inference_rate_decay: float = 1.0
    full_steps: int = 0
    rule: str = "descent"
    per_step_scale: bool = False
    kernels: str = "fused"

    has_energy = True

    @property
    def sizes(self) -> Sizes:
        """The length of every axis of its parameters."""
        sizes = super().sizes
        return sizes._replace(Y=self.head_dim or sizes.Y)

    @property
    def strict(self) -> bool:
        """Whether tokens are outside their own context."""
        return self.mask == "strict"

    # Parameters -----------------------------------------------------------------------------------

    @nn.nowrap
    def terms(self) -> dict[str, Energy]:
        """The energies by the names under which their values and parameters are found."""
        entries = {name: ENERGIES[name] for name in self.energy_names}
        labels = [entry.label for entry in entries.values()]
        twice = {label for label in labels if labels.count(label) > 1}
        return {n if e.label in twice else e.label: e for n, e in entries.items()}

    @nn.nowrap
    def block_table(self) -> Table:
        """The parameters of one block, by term, and those of the norm, rate and rule."""
        found: dict[str, Specs] = {n: self._specs(e.specs) for n, e in self.terms().items()}
        found["combination"] = COMBINATIONS[self.combination].specs
        found["norm"] = NORMS[self.norm].specs
        found["rate"] = RATES[self.inference_rate].specs(self.inference_rate_init)
        found["rule"] = RULES[self.rule].specs
        return found

    @nn.nowrap
    def _specs(self, specs: Specs) -> Specs:
        """The table of an energy with alpha and beta as configured."""
        own = {}
        if "alpha" in specs:
            own["alpha"] = constant(1.0, "H") if self.learn_alpha else specs["alpha"]
        if "beta" in specs:
            own["beta"] = positive(self.beta) if self.learn_beta else fixed(self.beta)
        return {**specs, **own}

    @nn.nowrap
    def tables(self) -> dict[str, Table]:
        """All parameters: those of any model, and the scales of single steps."""
        scales = {"steps": {"scale": positive(1.0, "T")}} if self.per_step_scale else {}
        return {**super().tables(), **scales}

    @nn.nowrap
    def pair_flops(self) -> float | None:
        """Scores and averages of attention energies, half of the square each."""
        attention = [entry for entry in self.terms().values() if entry.memory]
        if any(entry.width is None for entry in attention):
            return None
        widths = [
            math.prod(getattr(self.sizes, letter) for letter in (entry.width or "").split())
            for entry in attention
        ]
        return 2.0 * self.context_length * sum(widths)

    @nn.nowrap
    def with_kernels(self, choice: str) -> "NRGPT":
        """The same model by other derivative rules."""
        return self.clone(kernels=choice)

    def eta(self) -> jax.Array:
        """The inference rate: (), (D,) or (D,D), before any c_t; one of each of several blocks."""
        return self._block()["eta"]

    def gain(self) -> jax.Array:
        """The gain (D,) of the norm, or ones; with several blocks one of each."""
        return self._block()["gain"]

    def step_scales(self) -> Float[Array, "T"]:
        """c_t of every step."""
        return (
            self.group_params("steps")["scale"] if self.per_step_scale else jnp.ones(self.num_steps)
        )

    def rates(self) -> Float[Array, "T"]:
        """What the inference rate is multiplied by in every step."""
        faded = jnp.maximum(jnp.arange(self.num_steps) + 1 - self.full_steps, 0)
        return self.inference_rate_decay ** faded.astype(jnp.float32)

    @nn.nowrap
    def _block(self) -> dict[str, Any]:
        """The parameters of a block (or of several, stacked), and what is made of them once."""
        block = self.group_params("block")
        shape = (
            (self.num_distinct_layers, self.embed_dim)
            if self.num_distinct_layers > 1
            else (self.embed_dim,)
        )
        block["gain"] = block["norm"].get("gain", jnp.ones(shape))
        of_block = RATES[self.inference_rate].eta
        over_blocks = jax.vmap(of_block) if self.num_distinct_layers > 1 else of_block
        block["eta"] = over_blocks(block["rate"], block["gain"])
        return block

    # The dynamics ---------------------------------------------------------------------------------

    @nn.nowrap
    def _dynamics(
        self, block: dict[str, Any], causal_mask: CausalMask, first: BatchStates
    ) -> Dynamics:
        """Of one step, with the parameters of its block."""
        bound = {
            label: bind(entry, block[label], kernel_of(name, self.kernels), self.dtype)
            for name, (label, entry) in zip(self.energy_names, self.terms().items(), strict=True)
        }
        constrained = RATES[self.inference_rate].constrained
        return assemble(
            bound,
            bind_norm(self.norm, block["norm"], norm_kernel(self.norm, self.kernels)),
            block["eta"] if constrained else block["eta"].astype(self.dtype),
            causal_mask,
            first,
            rule=self.rule,
            rule_params=block["rule"],
            combination=self.combination,
            combination_params=block["combination"],
        )

    @nn.nowrap
    def _bind(
        self, x: BatchStates, causal_mask: CausalMask
    ) -> tuple[dict[str, Any], Callable[[Any], Dynamics]]:
        inputs, block_of = self.layer_schedule(self._block())
        inputs["scale"] = self.step_scales()
        if self.inference_rate_decay == 1.0:
            return inputs, lambda inputs_t: self._dynamics(block_of(inputs_t), causal_mask, x)
        inputs["rate"] = self.rates()

        def dynamics_at(inputs_t: Any) -> Dynamics:
            block = block_of(inputs_t)
            return self._dynamics({**block, "eta": inputs_t["rate"] * block["eta"]}, causal_mask, x)

        return inputs, dynamics_at

    def dynamics(self, x: BatchStates) -> tuple[Any, Callable[[Any], Dynamics]]:
        """(inputs, dynamics_at): `dynamics_at` gives the dynamics of a step from its inputs.

        `inputs` are a tree of arrays with T in front; x (B,N,D) are the states before the first
        step. For pure functions on states: `model.bind(variables).dynamics(x)`.
        """
        return self._bind(x, CausalMask(self.strict))

    def after(
        self, x: BatchStates, options: core.RolloutOptions, keys: StepKeys | None = None
    ) -> State:
        inputs, dynamics_at = self.dynamics(x)
        if keys is not None:
            inputs["keys"] = keys
        held = None
        if options.context is not None:
            at = dynamics_at(_first(inputs))
            held = update_cache(at, options.context, at.norm.function(options.context.x))[0]

        def step(state: State, inputs_t):  # narrows parameters here: gradients add up in float32
            dropped = self._dropped(inputs_t["keys"], x.shape[1]) if "keys" in inputs_t else None
            return one_step(dynamics_at(inputs_t), state, inputs_t["scale"], dropped, held)[0], None

        state = options.begin or start(dynamics_at(_first(inputs)))
        unroll, remat, num_skipped_steps = self.scan_unroll, self.remat, options.num_skipped_steps
        return core.rollout(
            step, state, inputs, unroll=unroll, remat=remat, num_skipped_steps=num_skipped_steps
        )[0]

    def rollout_n(self, tokens: Tokens, count: jax.Array) -> State:
        inputs, dynamics_at = self.dynamics(self.embed(tokens))
        first = _first(inputs)
        step = lambda state, i: (one_step(dynamics_at(i), state, i["scale"])[0], None)
        return core.rollout_n(step, start(dynamics_at(first)), first, count)

    def decoded(self, tokens: Tokens, end: State, prompt: Int[Array, ""]) -> BatchStates:
        """Where tokens end that are decoded behind a prompt, with a fixed-point cache.

        Args:
          tokens: (B,N).
          end: of their usual descent, where those of the prompt stay.
          prompt: so many tokens are read at once.
        """
        x, (rows, count) = self.embed(tokens), tokens.shape
        inputs, dynamics_at = self.dynamics(x)
        empty = self.empty_cache(rows, count, "fixed_point")
        cache = core.write_final_states(dynamics_at, inputs, end._replace(cache=empty), True).cache
        read = jnp.arange(count)[:, None] < prompt
        x = jnp.where(read, end.x, x)
        return self.decode_scan(x, cache, Decoding("fixed_point"), prompt)[0]

    @nn.nowrap
    def _dropped(self, keys: RowKeys, count: int) -> Dropout:
        keep = 1.0 - self.dropout
        mask = lambda key, *shape: jax.random.bernoulli(key, keep, shape).astype(jnp.float32) / keep

        def of_row(key):
            of_weights, of_output = jax.random.split(key)
            weights = mask(of_weights, self.num_heads, count, count)
            return Dropout(weights, mask(of_output, count, self.embed_dim))

        return jax.vmap(of_row)(keys)

    def gain_of(self, tokens: Tokens, state: State, v: BatchStates) -> Float[Array, "B N"]:
        """||J v|| / ||v|| of one more step, J each token's own with its context held fixed."""
        inputs, dynamics_at = self.dynamics(self.embed(tokens))
        last = jax.tree.map(lambda leaf: leaf[-1], inputs)
        step_at = held_step(dynamics_at(last), state, last["scale"])
        pushed = jax.jvp(step_at, (state.x,), (v.astype(state.x.dtype),))[1]
        return jnp.linalg.norm(pushed, axis=-1) / jnp.linalg.norm(v, axis=-1)

    def squared_distance(self, x: BatchStates, y: BatchStates) -> Float[Array, "B N"]:
        """||v - u||^2 / ||u||^2 of u = n(x) and v = n(y), n the norm without gain and bias."""
        norm = bind_norm(
            self.norm, self.group_params("block")["norm"], norm_kernel(self.norm, "plain")
        )
        u, v = norm.unit(x), norm.unit(y)
        return jnp.sum(jnp.square(v - u), axis=-1) / jnp.sum(jnp.square(u), axis=-1)

    # What energies show ---------------------------------------------------------------------------

    def trajectory(self, tokens: Tokens) -> core.Trajectory:
        """The path of every sequence: states (B,T+1,N,D), and the same of what comes with them."""
        inputs, dynamics_at = self.dynamics(self.embed(tokens))
        path = core.trajectory(dynamics_at, inputs)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), path)

    def energies(self, tokens: Tokens) -> dict[str, jax.Array]:
        """Per-step per-token energies (T+1,B,N), by term (`attention`, ...) and in `total`."""
        return {k: jnp.swapaxes(e, 0, 1) for k, e in self.trajectory(tokens).energies.items()}

    # The making of text ---------------------------------------------------------------------------

    def cache_row(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what terms keep of a token, in one step, by term."""
        x = jax.ShapeDtypeStruct((1, 1, self.embed_dim), jnp.float32)

        def keep(x: BatchStates):
            inputs, dynamics_at = self.dynamics(x)
            at = dynamics_at(_first(inputs))
            return update_cache(at, start(at), x)[0]

        return {name: rows.shape[2:] for name, rows in jax.eval_shape(keep, x).items()}

    def forward_cached(
        self,
        x: BatchStates,
        cache: Cache,
        position: PerSequence | None,
        decoding: Decoding,
        active: Bool[Array, "B P"] | None = None,
    ) -> tuple[BatchStates, Cache, Int[Array, "B P"]]:
        self.check_decoding(decoding)
        inputs, dynamics_at = self._bind(x, CausalMask(self.strict, position))
        fixed_point = decoding.cache == "fixed_point"
        # A token that does not see itself finds the same rows there in all of its steps.
        hold = fixed_point and self.strict and position is not None
        held = {name: rows[0] for name, rows in cache.items()} if hold else None
        step = lambda state, i: one_step(dynamics_at(i), state, i["scale"], held=held)
        begin = start(dynamics_at(_first(inputs)), None if hold else cache)
        if decoding.until is None:
            alone = lambda state, i: (step(state, i)[0], None)
            state, _ = core.rollout(alone, begin, inputs, unroll=self.scan_unroll)
            steps = jnp.full(x.shape[:2], self.num_steps)
        else:
            grad_x = lambda state, i, seen: in_states(dynamics_at(i), state.x, seen.grad_g)
            moving = jnp.ones(x.shape[:2], bool) if active is None else active
            found = core.adaptive_rollout(step, grad_x, begin, inputs, moving, decoding.until)
            state, steps = found
        if hold:
            state = state._replace(cache=cache)
        if fixed_point or decoding.until is not None:
            state = core.write_final_states(dynamics_at, inputs, state, fixed_point)
        return state.x, state.cache, steps


def _first(inputs: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], inputs)
