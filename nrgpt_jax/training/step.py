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
    """The training state: everything that changes from step to step."""

    step: jax.Array  # () int32, completed steps, including skipped ones
    params: Any
    optimizer: Any  # the optax state
    skipped: Any  # () int32, steps skipped because the update was not finite
    skipped_in_a_row: Any  # () int32, consecutive skipped steps up to now


Metrics = dict[str, jax.Array]
LossAndGrads = Callable[..., tuple[tuple[jax.Array, Metrics], Any]]
IN_A_ROW = "skipped_in_a_row"  # a metric that is checked, not logged


def create_state(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Create the initial state, sharded over the devices of the mesh."""

    def init():
        return initial_state(model, optimizer, seed)

    return jax.jit(init, out_shardings=_shardings(abstract_state(model, optimizer, mesh)))()


def initial_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, seed: int | jax.Array
) -> TrainState:
    """Return the state before the first step; may be traced."""
    tokens = jnp.zeros((1, model.context_length), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def abstract_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Return the state as `jax.ShapeDtypeStruct` with shardings; nothing is computed."""
    params = abstract_params(model)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, jax.eval_shape(optimizer.init, params), count, count)
    return sharding.abstract(state, state_shardings(model, state, mesh))


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def state_shardings(model: LanguageModel, state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Return the sharding of each array of a state.

    Parameters and their moments follow the axes of the parameter tables; the rest is replicated.
    """
    everywhere = sharding.replicated(mesh)
    params = sharding.parameter_shardings(parameter_specs(model), mesh)
    with_path = jax.tree_util.tree_leaves_with_path
    shapes = {path: leaf.shape for path, leaf in with_path(state.params)}
    shardings = {(path, shapes[path]): where for path, where in with_path(params)}

    def of_optimizer(path: tuple, leaf: jax.ShapeDtypeStruct):
        """Return the sharding of a moment: that of the parameter whose path ends its path."""
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
    """Return `(params, batch, key, scale, step) -> ((loss, aux), gradients)`, summed over a batch.

    Loss and metrics are those of `losses.summed_loss`. Every device processes its share of the
    batch by itself, part by part, so that accelerator kernels can be used; `exchange` describes
    the collectives.
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
    """Compile `train_step` to `(state, batch) -> (state, metrics)`, which donates its state."""
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
    """Return the state after one training step, and its metrics; may be traced.

    If the loss or the gradient is not finite, parameters and optimizer state are unchanged and the
    step is counted as skipped.

    Random numbers are a function of seed, step and row of the batch, so that a resumed run
    reproduces them on any devices.

    Args:
      state, batch: the state before the step, and the batch to train on.
      seed: the seed of the run.
      optimizer: the optimizer, as from `create_optimizer`.
      loss_and_grads: a function like that of `make_loss_and_grads`.
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
