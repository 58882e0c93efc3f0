"""Counts what a reader walks through: functions of the package that one step enters.

    python tests/walk_helpers.py [--list | --json]

One training step of the default model is traced, and a prompt is read and a token drawn. Counted
are functions and lambdas, but not comprehensions (they are no calls since Python 3.12), the files
that they are in, and the frames of the package on the stack at once, below the first one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Walk(NamedTuple):
    """What was entered, in order, and the deepest stack."""

    functions: list[tuple[str, str]]  # file, name
    stack: list[str]  # below the first frame

    @property
    def files(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(file for file, _ in self.functions))

    def __str__(self) -> str:
        counts = f"{len(self.functions)} functions in {len(self.files)} files"
        return f"{counts}, {len(self.stack)} frames deep"


def walk(function: Callable[[], Any]) -> Walk:
    """What a call enters of the package."""
    functions: dict[tuple[str, int, str], None] = {}
    stack: list[str] = []

    def is_ours(code: Any) -> bool:
        own = code.co_filename.startswith(PACKAGE)
        return own and not code.co_qualname.endswith(COMPREHENSIONS)

    def enter(frame: Any, event: str, argument: Any) -> None:
        nonlocal stack
        code = frame.f_code
        if event != "call" or not is_ours(code):
            return
        functions[code.co_filename.removeprefix(PACKAGE), code.co_firstlineno, code.co_qualname] = (
            None
        )
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
    return Walk([(file, name) for file, _, name in functions], stack)


def walks() -> dict[str, Walk]:
    """Of both roads, of the default model."""
    config = default_config()
    config.model.vocab_size = 65
    model, mesh = create_model(config), sharding.make_mesh(None, jax.devices()[:1])
    optimizer = optimizers.create_optimizer(config.optimizer, 100, parameter_specs(model))
    state = step.create_state(model, optimizer, 0, mesh)
    shape = 8, model.context_length
    batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.float32))
    train_step: Any = step.make_train_step(model, optimizer, 0, 1, mesh)
    prompts, variables = [np.array([1, 2, 3])], {"params": state.params}
    return {
        "batch to loss": walk(lambda: train_step.trace(state, batch)),
        "prompt to token": walk(lambda: generate(model, variables, prompts, 1)),
    }


if __name__ == "__main__":
    if "--json" in sys.argv:
        print(json.dumps({road: found._asdict() for road, found in walks().items()}))
        sys.exit()
    for road, found in walks().items():
        print(f"{road}: {found}")
        if "--list" in sys.argv:
            print(*(f"  {file}: {name}" for file, name in found.functions), sep="\n")
            print("  deepest:", " > ".join(found.stack))
