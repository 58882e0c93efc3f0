"""The training state and the compiled training step."""

from collections.abc import Callable
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from nrgpt_jax import losses, sharding


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


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    accumulation_steps: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """A compiled step `(state, windows (B,N+1)) -> (state, metrics)`; it consumes its state.

    Random numbers are a function of seed, step and part alone, so that a resumed run repeats
    them.
    """

    def loss_fn(params, window, key):
        rngs = {"dropout": key}
        logits = model.apply({"params": params}, window[:, :-1], train=True, rngs=rngs)
        logits = cast(jax.Array, logits)
        return jnp.mean(losses.cross_entropy(logits, window[:, 1:]))

    def mean_loss_and_grads(params, windows, key):
        """Averages over `accumulation_steps` equal parts of the batch, one at a time."""
        count = accumulation_steps
        if count == 1:
            return jax.value_and_grad(loss_fn)(params, windows, key)
        # Part i takes every count-th window, so that each device keeps its own.
        parts = windows.reshape(-1, count, windows.shape[-1]).swapaxes(0, 1)

        def add(total, part_and_key):
            found = jax.value_and_grad(loss_fn)(params, *part_and_key)
            return jax.tree.map(jnp.add, total, found), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        total, _ = jax.lax.scan(add, zeros, (parts, jax.random.split(key, count)))
        return jax.tree.map(lambda x: x / count, total)

    def train_step(state: TrainState, windows: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = mean_loss_and_grads(state.params, windows, key)
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
