"""AdamW or Muon with warm-up, decay of the learning rate, clipping and weight decay."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from nrgpt_jax.core.parameters import BLOCKS, ParameterSpec

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "exponential", "constant")
DECAYS = ("matrices", "all")
MUON_RMS = 0.2  # root mean square of a Muon update, times the learning rate: about AdamW's


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


def decay_mask(specs: Any, weight_decay_mask: str) -> Any:
    """Whether weight decay acts on each parameter of a tree of `ParameterSpec`."""
    decays = lambda spec: weight_decay_mask == "all" or spec.is_matrix
    return jax.tree.map(decays, specs, is_leaf=_is_spec)


def hidden_matrices(specs: Any) -> Any:
    """What Muon orthogonalizes: `optax.contrib.MuonDimensionNumbers` of each parameter, or None.

    Matrices between states; neither the rows of tokens and positions nor the head. The axis D (or,
    where there is none, the last) is one side of a matrix and the others together are the other
    side; where there are two, as in J (H,D,D), each head has a matrix of its own.
    """

    def numbers(spec: ParameterSpec) -> MuonDimensionNumbers | None:
        axes = [(i, letter) for i, letter in enumerate(spec.axes) if letter != BLOCKS]
        if not spec.is_matrix or {"V", "N"} & set(spec.axes):
            return None
        width = [i for i, letter in axes if letter == "D"] or [axes[-1][0]]
        others = [i for i, _ in axes if i not in width]
        sides = (width[:1], width[1:] or others)
        return MuonDimensionNumbers(*map(tuple, sides))

    return jax.tree.map(numbers, specs, is_leaf=_is_spec)


def create_optimizer(
    c: Mapping[str, Any], train_steps: int, specs: Any
) -> optax.GradientTransformation:
    """Global-norm clipping (if `clip_norm` > 0), then AdamW or Muon on the schedule of `c`.

    Muon (momentum 0.95) acts on `hidden_matrices`, its updates of AdamW's usual size, so that
    learning rates carry over; AdamW with Nesterov momentum acts on all others, embeddings and head
    among them, and decays these only if `weight_decay_mask` is `all`.

    Args:
      c: `config.optimizer`.
      train_steps: the step at which the final learning rate is reached.
      specs: `models.parameter_specs` of the model.

    Source: Muon, github.com/KellerJordan/Muon; the size of its updates, arXiv 2502.16982.
    """
    schedule, decays = (
        learning_rate_schedule(c, train_steps),
        decay_mask(specs, c["weight_decay_mask"]),
    )
    betas = c["beta1"], c["beta2"]
    if c["name"] == "muon":
        rule = muon(
            schedule,
            weight_decay=c["weight_decay"],
            weight_decay_mask=decays,
            adam_b1=betas[0],
            adam_b2=betas[1],
            adam_weight_decay=c["weight_decay"] if c["weight_decay_mask"] == "all" else 0.0,
            muon_weight_dimension_numbers=hidden_matrices(specs),
            consistent_rms=MUON_RMS,
        )
    else:
        rule = optax.adamw(schedule, *betas, weight_decay=c["weight_decay"], mask=decays)
    clips = c["clip_norm"] > 0
    clip = optax.clip_by_global_norm(c["clip_norm"]) if clips else optax.identity()
    return optax.chain(clip, rule)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParameterSpec)
