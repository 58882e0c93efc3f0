"""NRGPT: declares the parameters of energies, norm, rate and rule for `core.block`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Float

from nrgpt_jax.array_types import BatchStates, PerSequence, RowKeys, StepKeys, Tokens
from nrgpt_jax.core import descent
from nrgpt_jax.core.block import (
    COMBINATIONS,
    Dropout,
    Dynamics,
    EnergyAndGrad,
    State,
    Step,
    bind,
    block,
    start,
    update_cache,
)
from nrgpt_jax.core.energies import ENERGIES, Energy
from nrgpt_jax.core.norms import NORMS, bind_norm
from nrgpt_jax.core.parameters import Sizes, Specs, Table, constant, fixed, positive
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.models.language_model import LanguageModel, Record
from nrgpt_jax.registry import Registry


class NRGPT(LanguageModel):
    """Tokens descend the sum (or another combination) of energies for `num_steps` steps.

    The fields are those of `config.model`; `energy_names` are names in `core.energies.ENERGIES`.
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
    line_search: int = 0
    per_step_scale: bool = False
    options: Mapping[str, Any] = FrozenDict()

    has_energy = True

    @property
    def sizes(self) -> Sizes:
        """The length of every parameter axis."""
        sizes, options = super().sizes, dict[str, Any]()
        fields: list[tuple[Registry, str]] = [(ENERGIES, name) for name in self.energy_names]
        fields += [(NORMS, self.norm), (RATES, self.inference_rate), (RULES, self.rule)]
        for registry, name in [*fields, (COMBINATIONS, self.combination)]:
            options |= registry.options[name]
        return sizes._replace(Y=self.head_dim or sizes.Y, options=options | dict(self.options))

    @property
    def strict(self) -> bool:
        """Whether tokens are excluded from their own context."""
        return self.mask == "strict"

    # Parameters -----------------------------------------------------------------------------------

    @nn.nowrap
    def terms(self) -> dict[str, Energy]:
        """Return the energies, by the names of their values and parameters."""
        entries = {name: self._chosen(ENERGIES, name) for name in self.energy_names}
        labels = [entry.label for entry in entries.values()]
        twice = {label for label in labels if labels.count(label) > 1}
        return {n if e.label in twice else e.label: e for n, e in entries.items()}

    @nn.nowrap
    def _chosen(self, registry: Registry, name: str) -> Any:
        """Return a registered part, configured by the model's options."""
        return registry.configured(name, self.options) if self.options else registry[name]

    @nn.nowrap
    def block_table(self) -> Table:
        """The parameters of one block, by term, and those of the norm, rate and rule."""
        table: dict[str, Specs] = {n: self._specs(e.specs) for n, e in self.terms().items()}
        table["combination"] = COMBINATIONS[self.combination].specs
        table["norm"] = NORMS[self.norm].specs
        table["rate"] = RATES[self.inference_rate].specs(self.inference_rate_init)
        table["rule"] = RULES[self.rule].specs
        return table

    @nn.nowrap
    def _specs(self, specs: Specs) -> Specs:
        """The table of an energy with alpha and beta as configured."""
        overrides = {}
        if "alpha" in specs:
            overrides["alpha"] = constant(1.0, "H") if self.learn_alpha else specs["alpha"]
        if "beta" in specs:
            overrides["beta"] = positive(self.beta) if self.learn_beta else fixed(self.beta)
        return {**specs, **overrides}

    @nn.nowrap
    def tables(self) -> dict[str, Table]:
        """Return the parameter tables: those of any model, and the scale of each step."""
        scales = {"steps": {"scale": positive(1.0, "T")}} if self.per_step_scale else {}
        return {**super().tables(), **scales}

    @nn.nowrap
    def pair_flops(self) -> float:
        """FLOPs per token and step of energies that read other tokens.

        They are those of a product with each key and one in its gradient, over half of the square.
        """
        struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        g, at = struct((1, 1, self.embed_dim)), jax.ShapeDtypeStruct((1, 1), jnp.int32)
        width = 0
        for entry in self.terms().values():
            params = {name: struct(spec.shape(self.sizes)) for name, spec in entry.specs.items()}
            sides = [side for side in (entry.query, entry.key) if side is not None]
            of_sides = [jax.tree.leaves(jax.eval_shape(side, params, g, at)) for side in sides]
            width += max((sum(leaf.size for leaf in leaves) for leaves in of_sides), default=0)
        return 2.0 * self.context_length * width

    def eta(self) -> jax.Array:
        """The inference rate before any c_t: (), (D,) or (D,D); L of them for several blocks."""
        return self._block()["eta"]

    def gain(self) -> jax.Array:
        """The gain (D,) of the norm, or ones; L of them for several blocks."""
        return self._block()["gain"]

    def step_scales(self) -> Float[Array, "T"]:
        """c_t of every step."""
        return (
            self.group_params("steps")["scale"] if self.per_step_scale else jnp.ones(self.num_steps)
        )

    def rates(self) -> Float[Array, "T"]:
        """The factor of the inference rate in every step."""
        faded = jnp.maximum(jnp.arange(self.num_steps) + 1 - self.full_steps, 0)
        return self.inference_rate_decay ** faded.astype(jnp.float32)

    @nn.nowrap
    def _block(self) -> dict[str, Any]:
        """Return the parameters of the block (or of several, stacked), and derived values."""
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
    def dynamics(
        self, x: BatchStates, position: PerSequence | None = None
    ) -> tuple[Any, Callable[[Any], Dynamics]]:
        """Return (inputs, dynamics_at): `dynamics_at` maps the inputs of a step to its dynamics.

        `inputs` is a tree of arrays with leading axis T; x (B,N,D) are the states before the first
        step, `position` is as in `embed`. For pure functions on states:
        `model.bind(variables).dynamics(x)`.
        """
        inputs, block_of = self.layer_schedule(self._block())
        inputs["scale"] = self.step_scales()
        if self.inference_rate_decay != 1.0:
            inputs["rate"] = self.rates()

        constrained = RATES[self.inference_rate].constrained

        def dynamics_at(inputs_t: Any) -> Dynamics:
            params = block_of(inputs_t)
            eta = inputs_t["rate"] * params["eta"] if "rate" in inputs_t else params["eta"]
            eta = eta if constrained else eta.astype(self.dtype)
            norm = bind_norm(self.norm, params["norm"], self.implementation)
            return Dynamics(
                {name: bind(e, params[name], self.dtype) for name, e in self.terms().items()},
                norm,
                self._chosen(RULES, self.rule).make(params["rule"], eta, norm),
                x,
                self.mask == "strict",
                position,
                self._chosen(COMBINATIONS, self.combination),
                params["combination"],
                self.implementation,
                self.line_search,
            )

        return inputs, dynamics_at

    @nn.nowrap
    def steps(
        self,
        x: BatchStates,
        position: PerSequence | None = None,
        cache: Any = None,
        dropout_keys: StepKeys | None = None,
        record: Record | None = None,
        keys: Any = None,
    ) -> tuple[State, Any, Step]:
        """See `LanguageModel.steps`; `keys` are the visible keys of all steps, if they are held."""
        inputs, dynamics_at = self.dynamics(x, position)
        begin = start(dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs)), cache)
        inputs["dropout"] = dropout_keys

        def step(state: State, inputs_t: Any) -> tuple[State, Any]:
            # Parameters are cast here, so that their gradients accumulate in float32.
            dynamics = dynamics_at(inputs_t)
            keys_t = inputs_t["dropout"]
            dropout = None if keys_t is None else self._dropout(keys_t, x.shape[1])
            state, out = block(dynamics, state, inputs_t["scale"], dropout, keys)
            return state, None if record is None else record(dynamics, out)

        return begin, inputs, step

    @nn.nowrap
    def _dropout(self, keys: RowKeys, count: int) -> Dropout:
        keep = 1.0 - self.dropout
        mask = lambda key, *shape: jax.random.bernoulli(key, keep, shape).astype(jnp.float32) / keep

        def of_row(key):
            of_weights, of_output = jax.random.split(key)
            weights = mask(of_weights, self.num_heads, count, count)
            return Dropout(weights, mask(of_output, count, self.embed_dim))

        return jax.vmap(of_row)(keys)

    # Energies and trajectories --------------------------------------------------------------------

    def trajectory(self, tokens: Tokens) -> descent.Trajectory:
        """Return the trajectory of all tokens: states (T+1,B,N,D), energies, gradients, moves."""
        inputs, dynamics_at = self.dynamics(self.embed(tokens))
        return descent.trajectory(dynamics_at, inputs)

    def energies(self, tokens: Tokens) -> dict[str, jax.Array]:
        """Return the energies (T+1,B,N) of all tokens, by term (`attention`, ...) and `total`."""
        return dict(self.trajectory(tokens).energies)

    def gradients(self, tokens: Tokens) -> Float[Array, "steps B N D"]:
        """Return dE_A/dg_A of every token's total energy, before every step and after the last."""
        return self.trajectory(tokens).grad_g

    def step(
        self, x: BatchStates, t: int = 0, first: BatchStates | None = None
    ) -> tuple[BatchStates, EnergyAndGrad]:
        """Take one descent step; return the states after it, its energies and gradient.

        Args:
          x: (B,N,D) states of all tokens, for example from `embed`.
          t: index of the step, from 0.
          first: (B,N,D) states before step 0, which `injection` and `FFG_first` read; by default x.
            A rule with a state (momentum) starts from zero.
        """
        if not 0 <= t < self.num_steps:
            raise ValueError(f"step {t} of {self.num_steps}, which are numbered from 0")
        inputs, dynamics_at = self.dynamics(x if first is None else first)
        inputs_t = jax.tree.map(lambda leaf: leaf[t], inputs)
        dynamics = dynamics_at(inputs_t)
        state = start(dynamics)._replace(x=x, rule=dynamics.rule.init(x))
        state, out = block(dynamics, state, inputs_t["scale"])
        return state.x, out

    def cache_row(self) -> Any:
        """Return the keys of a token in one step, by term, as trees of `jax.ShapeDtypeStruct`."""
        x = jax.ShapeDtypeStruct((1, 1, self.embed_dim), jnp.float32)

        def keys(x: BatchStates):
            inputs, dynamics_at = self.dynamics(x)
            at = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
            return update_cache(at, start(at), x)[0]

        row = lambda key: jax.ShapeDtypeStruct(key.shape[2:], key.dtype)
        return jax.tree.map(row, jax.eval_shape(keys, x))
