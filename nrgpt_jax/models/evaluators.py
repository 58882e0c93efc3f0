"""Further measures of an evaluation by name, as `config.evaluators` lists them.

    @evaluator("confidence")
    def confidence(model, params, batch):
        logits = model.apply({"params": params}, batch.inputs)
        return jnp.max(jax.nn.softmax(logits), axis=-1)  # (B,N)

is written as `val/confidence`, its mean over the validation windows.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from nrgpt_jax.errors import require
from nrgpt_jax.registry import Registry

Subject = Literal["batch", "prompts"]


class Evaluator(NamedTuple):
    """A named measure of an evaluation.

    `of="batch"`: `(model, params, batch) -> (B,N)`, averaged by the weights of the batch, and
    traced. `of="prompts"`: `(model, params, prompts) -> float` of a set of `datasets.Prompts`.
    """

    function: Callable[[Any, Any, Any], Any]
    of: Subject


RESERVED = ("loss", "hits", "weights", "token_accuracy", "accuracy")  # of every evaluation
EVALUATORS: Registry[Evaluator] = Registry("evaluator")


def evaluator(name: str, of: Subject = "batch"):
    """Registers an evaluator, a choice of `config.evaluators`; as `Evaluator`."""
    if name in RESERVED:
        raise ValueError(f"evaluator {name!r}: the name is taken, as {', '.join(RESERVED)} are")
    return EVALUATORS.register(name, lambda function: Evaluator(function, of))


def check_evaluators(names: Sequence[str]) -> None:
    """Raises UserError where a name is not registered."""
    allowed = f"a tuple of registered evaluators: {', '.join(EVALUATORS) or '(none)'}"
    require(all(name in EVALUATORS for name in names), "evaluators", tuple(names), allowed)


def chosen(names: Sequence[str], of: Subject) -> dict[str, Callable[[Any, Any, Any], Any]]:
    """The functions of these names that are of batches, or of prompts. Raises UserError."""
    check_evaluators(names)
    entries = {name: EVALUATORS[name] for name in names}
    return {name: entry.function for name, entry in entries.items() if entry.of == of}
