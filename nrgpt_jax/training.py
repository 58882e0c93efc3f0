"""The training state and the compiled training step."""

from collections.abc import Callable
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from nrgpt_jax import losses, sharding
from nrgpt_jax.input_pipeline import Batch


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step."""

    step: jax.Array  # () int32, steps done
    params: Any
    optimizer: Any  # the optax state


Metrics = dict[str, jax.Array]


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh
) -> TrainState:
    """The initial state, created on the devices where it stays."""

    def init():
        tokens = jnp.zeros((1, model.context_length), jnp.int32)
        params = model.init(jax.random.key(seed), tokens)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=sharding.replicated(mesh))()


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every array is finite, () bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    accumulation_steps: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled step `(state, batch) -> (state, metrics)`; it consumes its state.

    Random numbers are a function of seed and step, so that a resumed run repeats them; with
    accumulation also of device and part, so that it takes as many devices to repeat them.
    """

    def loss_fn(params, batch: Batch, key, scale):
        rngs = {"dropout": key}
        logits = model.apply({"params": params}, batch.inputs, train=True, rngs=rngs)
        loss = losses.cross_entropy(cast(jax.Array, logits), jnp.asarray(batch.targets))
        return scale * jnp.sum(loss * batch.weights)

    def loss_and_grads(params, batch: Batch, key):
        """Of the weighted mean over the batch."""
        scale = 1.0 / jnp.maximum(jnp.sum(batch.weights), 1.0)
        if accumulation_steps == 1:
            return jax.value_and_grad(loss_fn)(params, batch, key, scale)
        return in_parts(params, batch, key, scale)

    def sum_over_parts(params, batch: Batch, key, scale):
        """Each device adds up its parts first: gradients are exchanged once a step."""
        key = jax.random.fold_in(key, jax.lax.axis_index(sharding.DATA_AXIS))
        split = lambda x: x.reshape(accumulation_steps, -1, x.shape[-1])
        parts = jax.tree.map(split, batch), jax.random.split(key, accumulation_steps)

        def add(total, part):
            found = jax.value_and_grad(loss_fn)(params, *part, scale)
            return jax.tree.map(jnp.add, total, found), None

        zeros = jax.tree.map(jnp.zeros_like, (scale, params))
        total = jax.lax.scan(add, zeros, parts)[0]
        return jax.lax.psum(total, sharding.DATA_AXIS)

    in_parts = jax.shard_map(
        sum_over_parts,
        mesh=mesh,
        in_specs=(P(), P(sharding.DATA_AXIS), P(), P()),
        out_specs=P(),
        check_vma=False,  # the sums differ from device to device until the last line
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = loss_and_grads(state.params, batch, key)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"train/loss": loss, "train/grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, optimizer_state), metrics

    whole = sharding.replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(whole, sharding.batch_sharding(mesh)),
        out_shardings=whole,
    )
