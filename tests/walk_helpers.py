"""What a reader walks through: functions of the package that one step enters, as JSON.

    python tests/walk_helpers.py

One training step of the default model is traced, and a prompt is read and a token drawn. Counted
are functions and lambdas, but not comprehensions (they are no calls since Python 3.12), and the
frames of the package on the stack at once, below the first one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import nrgpt_jax
from nrgpt_jax.array_types import Batch
from nrgpt_jax.configs import default_config
from nrgpt_jax.generation.generate import generate
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.training import optimizers, step

PACKAGE = f"{Path(nrgpt_jax.__file__).parent}/"
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")


def is_ours(code: Any) -> bool:
    """Whether it is a function of the package."""
    own = code.co_filename.startswith(PACKAGE)
    return own and not code.co_qualname.endswith(COMPREHENSIONS)


def walk(function: Callable[[], Any]) -> dict[str, list]:
    """What a call enters of the package, as (file, name) in order, and the deepest stack."""
    functions: dict[tuple[str, int, str], None] = {}
    stack: list[str] = []

    def enter(frame: Any, event: str, argument: Any) -> None:
        nonlocal stack
        code = frame.f_code
        if event != "call" or not is_ours(code):
            return
        file = code.co_filename.removeprefix(PACKAGE)
        functions[file, code.co_firstlineno, code.co_qualname] = None
        path = []
        while frame is not None:
            path += [frame.f_code.co_qualname] if is_ours(frame.f_code) else []
            frame = frame.f_back
        stack = max(stack, path[-2::-1], key=len)

    jax.clear_caches()
    sys.setprofile(enter)
    try:
        function()
    finally:
        sys.setprofile(None)
    return {"functions": [(file, name) for file, _, name in functions], "stack": stack}


def walks() -> dict[str, dict[str, list]]:
    """Of both roads, of the default model."""
    config = default_config()
    config.model.vocab_size = 65
    model, mesh = create_model(config), sharding.make_mesh(None, jax.devices()[:1])
    optimizer = optimizers.create_optimizer(config.optimizer, 100, parameter_specs(model))
    state = jax.eval_shape(lambda: step.create_state(model, optimizer, 0, mesh))
    shape = 8, model.context_length
    batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.float32))
    train_step: Any = step.make_train_step(model, optimizer, 0, 1, mesh)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.params)
    prompts, variables = [np.array([1, 2, 3])], {"params": params}
    return {
        "batch to loss": walk(lambda: train_step.trace(state, batch)),
        "prompt to token": walk(lambda: generate(model, variables, prompts, 1)),
    }


if __name__ == "__main__":
    print(json.dumps(walks()))
