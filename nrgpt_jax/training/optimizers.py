"""AdamW with warm-up, decay of the learning rate, clipping and weight decay."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from nrgpt_jax.core.parameters import ParameterSpec

SCHEDULES = ("cosine", "exponential", "constant")
DECAYS = ("matrices", "all")


def learning_rate_schedule(c: Mapping[str, Any], train_steps: int) -> optax.Schedule:
    """Linear warm-up, then `c.schedule` from `learning_rate` to `final_learning_rate`.

    Args:
      c: `config.optimizer`.
      train_steps: the step at which the final learning rate is reached.
    """
    peak, final, warmup = c["learning_rate"], c["final_learning_rate"], c["warmup_steps"]
    decay_steps = max(train_steps - warmup, 1)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=final / peak),
        "exponential": lambda: optax.exponential_decay(
            peak, decay_steps, final / peak, end_value=final
        ),
        "constant": lambda: optax.constant_schedule(peak),
    }[c["schedule"]]()
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])


def decay_mask(specs: Any, decay: str) -> Any:
    """Whether weight decay acts on each parameter of a tree of `ParameterSpec`."""
    decays = lambda spec: decay == "all" or spec.is_matrix
    return jax.tree.map(decays, specs, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))


def create_optimizer(
    c: Mapping[str, Any], train_steps: int, specs: Any
) -> optax.GradientTransformation:
    """Global-norm clipping (if `clip_norm` > 0), then AdamW on the schedule of `c`.

    Args:
      c: `config.optimizer`.
      train_steps: the step at which the final learning rate is reached.
      specs: `models.parameter_specs` of the model.
    """
    adamw = optax.adamw(
        learning_rate_schedule(c, train_steps),
        b1=c["beta1"],
        b2=c["beta2"],
        weight_decay=c["weight_decay"],
        mask=decay_mask(specs, c["decay"]),
    )
    clips = c["clip_norm"] > 0
    clip = optax.clip_by_global_norm(c["clip_norm"]) if clips else optax.identity()
    return optax.chain(clip, adamw)
