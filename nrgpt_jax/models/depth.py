"""Models with another number of steps than they were trained with."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from nrgpt_jax.array_types import Variables
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.models.gpt import GPT
from nrgpt_jax.models.nrgpt import NRGPT


def with_num_steps(
    model: nn.Module, variables: Variables, num_steps: int
) -> tuple[nn.Module, Variables]:
    """The model and its variables, making `num_steps` steps.

    Learned step scales go on with the last one.

    Raises:
      UserError: the model has a block of its own for every step, or there is no step.
    """
    require(num_steps > 0, "num_steps", num_steps, "at least 1")
    if not isinstance(model, (GPT, NRGPT)) or num_steps == model.num_steps:
        return model, variables
    if isinstance(model, GPT) and not model.shared:
        raise UserError(
            f"GPT has {model.num_steps} different blocks and makes {model.num_steps} steps; "
            "models that share one block can make more or fewer"
        )
    deeper = model.clone(num_steps=num_steps)
    params: dict[str, Any] = dict(variables["params"])
    scales = params.get("scales", {})
    if "log_step_scale" in scales:
        old = scales["log_step_scale"]
        new = old[jnp.minimum(jnp.arange(num_steps), len(old) - 1)]
        params["scales"] = {**scales, "log_step_scale": new}
    return deeper, {**variables, "params": params}
