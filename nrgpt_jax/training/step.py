"""The training state and the compiled training step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from nrgpt_jax.array_types import Batch
from nrgpt_jax.models import LanguageModel, abstract_params, parameter_specs, sharding
from nrgpt_jax.training import exchange, losses
from nrgpt_jax.training.depths import Depth


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step."""

    step: jax.Array  # () int32, steps done, skipped ones too
    params: Any
    optimizer: Any  # the optax state
    skipped: Any  # () int32, steps whose update was not finite and left out
    skipped_in_a_row: Any  # () int32, the last ones of them


Metrics = dict[str, jax.Array]
LossAndGrads = Callable[..., tuple[tuple[jax.Array, Metrics], Any]]
IN_A_ROW = "skipped_in_a_row"  # a metric that is looked at and not written


def create_state(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The initial state, created on the devices where it stays."""

    def init():
        return initial_state(model, optimizer, seed)

    return jax.jit(init, out_shardings=_shardings(abstract_state(model, optimizer, mesh)))()


def initial_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, seed: int | jax.Array
) -> TrainState:
    """The state before the first step; may be traced."""
    tokens = jnp.zeros((1, model.context_length), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def abstract_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`, each with its sharding; nothing is computed."""
    params = abstract_params(model)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, jax.eval_shape(optimizer.init, params), count, count)
    return sharding.abstract(state, state_shardings(model, state, mesh))


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def state_shardings(model: LanguageModel, state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """The sharding of each array of a state.

    Parameters and their moments follow the axes of the parameter tables; the rest is replicated.
    """
    everywhere = sharding.replicated(mesh)
    params = sharding.parameter_shardings(parameter_specs(model), mesh)
    with_path = jax.tree_util.tree_leaves_with_path
    shapes = {path: leaf.shape for path, leaf in with_path(state.params)}
    shardings = {(path, shapes[path]): where for path, where in with_path(params)}

    def of_optimizer(path: tuple, leaf: jax.ShapeDtypeStruct):
        """The sharding of a moment: that of the parameter whose path ends its own."""
        candidates = (shardings.get((path[start:], leaf.shape)) for start in range(len(path)))
        return next(filter(None, candidates), everywhere)

    optimizer = jax.tree_util.tree_map_with_path(of_optimizer, state.optimizer)
    return TrainState(cast(Any, everywhere), params, optimizer, everywhere, everywhere)


def make_loss_and_grads(
    model: LanguageModel,
    accumulation_steps: int,
    mesh: jax.sharding.Mesh,
    depth: Depth | None = None,
    step_metrics: Sequence[str] = (),
) -> LossAndGrads:
    """`(params, batch, key, scale, step) -> ((loss, aux), gradients)`, sums over the batch.

    They are those of `losses.summed_loss`. Every device works through its share of the batch by
    itself, part by part (there the kernels of accelerators can be used); `exchange` says what they
    exchange, once.
    """
    partitions = sharding.parameter_partitions(parameter_specs(model))
    of_device = exchange.of_rows(partitions)

    def sum_over_parts(params, batch: Batch, key, scale, step):
        params, count = exchange.gather(params, partitions, mesh), len(batch.inputs)
        rows = jax.lax.axis_index(sharding.BATCH_AXES) * count + jnp.arange(count)
        parts = jax.tree.map(
            lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:]), (batch, rows)
        )

        def add(total, part):
            options = key, scale, step, depth, step_metrics
            value_and_grad = jax.value_and_grad(losses.summed_loss, has_aux=True)
            (loss, aux), grads = value_and_grad(params, model, *part, *options)
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        zeros = jax.tree.map(jnp.zeros_like, (scale, params))
        (loss, grads), aux = jax.lax.scan(add, zeros, parts)
        aux = {name: jnp.sum(value, axis=0) for name, value in aux.items()}
        values = jax.lax.psum((loss, aux), sharding.BATCH_AXES)
        return values, exchange.scatter(grads, partitions, mesh)

    in_specs = (of_device, P(sharding.BATCH_AXES), P(), P(), P())
    return exchange.over_rows(sum_over_parts, mesh, in_specs, (P(), of_device))


def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    seed: int,
    accumulation_steps: int,
    mesh: jax.sharding.Mesh,
    depth: Depth | None = None,
    step_metrics: Sequence[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled `(state, batch) -> (state, metrics)` of `train_step`; consumes its state."""
    loss_and_grads = make_loss_and_grads(model, accumulation_steps, mesh, depth, step_metrics)
    step = functools.partial(
        train_step, seed=seed, optimizer=optimizer, loss_and_grads=loss_and_grads
    )
    where = _shardings(abstract_state(model, optimizer, mesh))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(where, sharding.batch_sharding(mesh)),
        out_shardings=(where, sharding.replicated(mesh)),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    seed: int | jax.Array,
    optimizer: optax.GradientTransformation,
    loss_and_grads: LossAndGrads,
) -> tuple[TrainState, Metrics]:
    """The state after one training step, and what is written of it; may be traced.

    Where the loss or the gradient is not finite, parameters and optimizer stay as they are, and
    the step is counted as skipped.

    Random numbers are a function of seed, step and row of the batch, so that a resumed run
    repeats them on any devices.

    Args:
      state, batch: before the step, and what it learns from.
      seed: of the run.
      optimizer: of `create_optimizer`.
      loss_and_grads: of `make_loss_and_grads`, or one like it.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    scale = 1.0 / jnp.maximum(jnp.sum(batch.weights), 1.0)
    (loss, aux), grads = loss_and_grads(state.params, batch, key, scale, state.step)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    moved = optax.apply_updates(state.params, updates), optimizer_state
    stay = state.params, state.optimizer
    params, optimizer_state = jax.tree.map(functools.partial(jnp.where, finite), moved, stay)
    skipped = state.skipped + ~finite
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": norm,
        "train/skipped_steps": skipped,
        IN_A_ROW: in_a_row,
        **{f"train/{name}": value for name, value in aux.items()},
    }
    return TrainState(state.step + 1, params, optimizer_state, skipped, in_a_row), metrics
