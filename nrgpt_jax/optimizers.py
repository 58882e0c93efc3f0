"""AdamW with warm-up, decay and clipping; weight decay on matrices only."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

SCHEDULES = ("cosine", "exponential", "constant")
STACKED = ("blocks",)  # subtrees whose parameters carry a leading axis of T independent blocks


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


def decay_mask(params: Any) -> Any:
    """True for matrices: everything with two axes or more, not counting that of the blocks."""

    def is_matrix(path, parameter) -> bool:
        stacked = path[0].key in STACKED and _is_stacked(params[path[0].key])
        return parameter.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _is_stacked(block: Mapping[str, Any]) -> bool:
    return block["norm1"]["bias"].ndim == 2


def create_optimizer(c: Mapping[str, Any], train_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping (if `clip_norm` > 0), then AdamW on the schedule of `c`."""
    adamw = optax.adamw(
        learning_rate_schedule(c, train_steps),
        b1=c["beta1"],
        b2=c["beta2"],
        weight_decay=c["weight_decay"],
        mask=decay_mask,
    )
    clips = c["clip_norm"] > 0
    clip = optax.clip_by_global_norm(c["clip_norm"]) if clips else optax.identity()
    return optax.chain(clip, adamw)
