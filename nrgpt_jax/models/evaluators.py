"""Registered evaluators: further measures of an evaluation, selected in `config.evaluators`.

    @evaluator("confidence")
    def confidence(model, params, batch):
        logits = model.apply({"params": params}, batch.inputs)
        return jnp.max(jax.nn.softmax(logits), axis=-1)  # (B,N)

The result is reported as `val/confidence`, its mean over the validation windows.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from nrgpt_jax.errors import require
from nrgpt_jax.registry import Registry

Subject = Literal["batch", "prompts"]


class Evaluator(NamedTuple):
    """A named measure of an evaluation.

    `of="batch"`: `(model, params, batch) -> (B,N)`, traced, and averaged with the batch's weights.
    `of="prompts"`: `(model, params, prompts) -> float` for a set of `datasets.Prompts`.
    """

    function: Callable[[Any, Any, Any], Any]
    of: Subject


RESERVED = ("loss", "hits", "weights", "token_accuracy", "accuracy")  # measures of every evaluation
EVALUATORS: Registry[Evaluator] = Registry("evaluator")


def evaluator(name: str, of: Subject = "batch"):
    """Register an evaluator, selectable in `config.evaluators`; arguments as in `Evaluator`."""
    if name in RESERVED:
        raise ValueError(f"evaluator {name!r}: the name is taken, as {', '.join(RESERVED)} are")
    return EVALUATORS.register(name, lambda function: Evaluator(function, of))


def check_evaluators(names: Sequence[str]) -> None:
    """Raise UserError if a name is not registered."""
    allowed = f"a tuple of registered evaluators: {', '.join(EVALUATORS) or '(none)'}"
    require(all(name in EVALUATORS for name in names), "evaluators", tuple(names), allowed)


def chosen(names: Sequence[str], of: Subject) -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Return the named evaluators of batches, or of prompts. Raises UserError."""
    check_evaluators(names)
    entries = {name: EVALUATORS[name] for name in names}
    return {name: entry.function for name, entry in entries.items() if entry.of == of}
