"""Optimizers and learning-rate schedules by name: AdamW, Muon, and all of optax."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from nrgpt_jax.core.parameters import BLOCKS, ParameterSpec, matrix
from nrgpt_jax.datasets import GIVEN
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.registry import check_options

OPTIMIZERS = ("adamw", "muon")  # with their own settings; other names are optax's
SCHEDULES = ("cosine", "exponential", "constant")
DECAYS = ("matrices", "all")
MUON_RMS = 0.2  # RMS of a Muon update, in units of the learning rate: about AdamW's


def learning_rate_schedule(c: Mapping[str, Any], train_steps: int) -> optax.Schedule:
    """Create a schedule: linear warm-up to `learning_rate`, then `c.schedule` to the final one.

    A schedule of optax is called with `c.schedule_options` and, where it has these arguments, with
    the learning rate as `value`, `init_value` or `peak_value`, the final one as `end_value`, the
    steps after the warm-up as `decay_steps` or `transition_steps`, and `warmup_steps` 0.

    Args:
      c: `config.optimizer`.
      train_steps: the step at which the final learning rate is reached.

    Raises:
      UserError: optax has no such schedule, or the schedule no such argument.
    """
    peak, final, warmup = c["learning_rate"], c["final_learning_rate"], c["warmup_steps"]
    decay_steps = max(train_steps - warmup, 1)
    own = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=final / peak),
        "exponential": lambda: optax.exponential_decay(
            peak, decay_steps, final / peak, end_value=final
        ),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if c["schedule"] in own:
        decay = own[c["schedule"]]()
    else:
        settings = dict.fromkeys(("value", "init_value", "peak_value"), peak)
        settings |= dict.fromkeys(("decay_steps", "transition_steps"), decay_steps)
        settings |= {"end_value": final, "warmup_steps": 0}
        decay = _of_optax("schedule", c, settings)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])


def decay_mask(specs: Any, weight_decay_mask: str) -> Any:
    """Return whether weight decay acts on each parameter of a tree of `ParameterSpec`."""
    decays = lambda spec: weight_decay_mask == "all" or spec.is_matrix
    return jax.tree.map(decays, specs, is_leaf=_is_spec)


def hidden_matrices(specs: Any) -> Any:
    """Return the `optax.contrib.MuonDimensionNumbers` of each parameter; None: not for Muon.

    Muon orthogonalizes matrices between states, not the embeddings of tokens and positions or the
    head. The axis D (or else the last axis) is one side of a matrix, and the other axes together
    are the other side. With two axes D, as in J (H,D,D), each head has its own matrix.
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
    """Create global-norm clipping (if `clip_norm` > 0) and the optimizer `c.name` on its schedule.

    Muon (momentum 0.95) acts on `hidden_matrices`. Its updates have AdamW's usual size, so that
    learning rates carry over. AdamW with Nesterov momentum acts on all other parameters, including
    embeddings and head, and decays these only if `weight_decay_mask` is `all`.

    An optimizer of optax or `optax.contrib` is called with the schedule, with `weight_decay`,
    `mask`, `b1` and `b2` where it has these arguments, and with `c.options`.

    Args:
      c: `config.optimizer`.
      train_steps: the step at which the final learning rate is reached.
      specs: `models.parameter_specs` of the model.

    Raises:
      UserError: optax has no such optimizer, or the optimizer no such argument.

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
    elif c["name"] == "adamw":
        rule = optax.adamw(schedule, *betas, weight_decay=c["weight_decay"], mask=decays)
    else:
        allowed = "it stands for one that was handed to nrgpt_jax.train(optimizer=...): do so again"
        require(c["name"] != GIVEN, "optimizer.name", GIVEN, allowed)
        settings = {"learning_rate": schedule, "weight_decay": c["weight_decay"], "mask": decays}
        settings |= {"b1": betas[0], "b2": betas[1]}
        rule = _of_optax("name", c, settings)
    clips = c["clip_norm"] > 0
    clip = optax.clip_by_global_norm(c["clip_norm"]) if clips else optax.identity()
    return optax.chain(clip, rule)


def _of_optax(field: str, c: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Call optax's function `c[field]` with the settings that it accepts and with its options.

    Raises:
      UserError: optax has no such function, or the function no such option.
    """
    kind, group = ("optimizer", "options") if field == "name" else ("schedule", "schedule_options")
    name, options = c[field], dict(c[group])
    function: Any = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    known = inspect.signature(function).parameters if inspect.isfunction(function) else {}
    if not known or (field == "name" and "learning_rate" not in known):
        near = difflib.get_close_matches(name, [*dir(optax), *dir(optax.contrib)], n=3)
        own = OPTIMIZERS if field == "name" else SCHEDULES
        allowed = f"one of {', '.join(own)}, or another {kind} of optax by its name"
        require(False, f"optimizer.{field}", name, allowed + f" ({', '.join(near)}?)" * bool(near))
    for option, value in options.items():
        place, free = f"optimizer.{group}.{option}", [n for n in known if n not in settings]
        require(option in free, place, value, f"optax.{name} has besides {', '.join(free)}")
        usual = known[option].default
        words = isinstance(value, str) and isinstance(usual, (bool, int, float))
        require(not words, place, value, f"a value like {usual!r}")
    chosen = {n: value for n, value in settings.items() if n in known} | options
    try:
        return function(**chosen)
    except Exception as error:  # an argument is missing or has the wrong type
        raise UserError(f"optimizer.{field}={name}: optax says {error}") from None


def check_names(c: Mapping[str, Any]) -> None:
    """Raise UserError if the optimizer or schedule does not exist or cannot train."""
    for field, own, group in (
        ("name", OPTIMIZERS, "options"),
        ("schedule", SCHEDULES, "schedule_options"),
    ):
        if c[field] in own:
            check_options(f"optimizer.{group}", c[group], {})
    struct = jax.ShapeDtypeStruct  # nothing is computed
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            jax.eval_shape(learning_rate_schedule(c, 100), struct((), jnp.int32))
            if c["name"] not in (*OPTIMIZERS, GIVEN):
                optimizer = create_optimizer(c, 100, {"w": matrix("D D")})
                step = lambda p: optimizer.update(p, optimizer.init(p), p)
                jax.eval_shape(step, {"w": struct((2, 2), jnp.float32)})
    except UserError:
        raise
    except Exception as error:  # it needs more than gradients: a loss, a Hessian, a line search
        reason = " ".join(str(error).split())[:200]
        names = f"optimizer.name={c['name']} with optimizer.schedule={c['schedule']}"
        raise UserError(f"{names} cannot be used here: {reason}") from None


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParameterSpec)
