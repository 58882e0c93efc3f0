"""Evaluation: losses over a split and answers to prompts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets import Prompts
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import Continuation, Settings, generate
from nrgpt_jax.models import LanguageModel, parameter_specs, sharding
from nrgpt_jax.training import exchange, losses

PROMPTS_AT_ONCE = 128


def make_eval_step(
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    parts: int = 1,
    num_symbols: int | None = None,
    evaluators: Sequence[str] = (),
) -> Callable[[Any, Batch], Any]:
    """Compile `(params, batch) -> sums` of loss, hits, weights and evaluators.

    Args:
      model: the model from `create_model`.
      mesh: the mesh of the parameters and batches.
      parts: the number of parts in which every device processes its rows; the next larger
        divisor if it does not divide them.
      num_symbols: the tokenizer's vocabulary size; tokens from here on are padding, never a hit.
      evaluators: names in `models.evaluators.EVALUATORS`.
    """
    partitions = sharding.parameter_partitions(parameter_specs(model))

    def of_device(params, batch: Batch):
        params = exchange.gather(params, partitions, mesh)
        rows = len(batch.inputs)
        count = next((n for n in range(parts, rows) if rows % n == 0), rows)
        split = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)
        sums = lambda part: losses.batch_sums(params, model, part, num_symbols, evaluators)
        result = jax.lax.map(sums, split)
        total = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), result)
        return jax.lax.psum(total, sharding.BATCH_AXES)

    in_specs = exchange.of_rows(partitions), P(sharding.BATCH_AXES)
    return jax.jit(exchange.over_rows(of_device, mesh, in_specs, P()))


def evaluate_loss(
    eval_step: Callable[[Any, Batch], Any],
    params: Any,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Compute mean cross-entropy in nats, next-token accuracy and evaluators over all tokens.

    Each process passes its `sharding.local_rows` of every batch.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in eval_step(params, sharding.put_batch(batch, mesh)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    count = totals.pop("weights", 0.0)
    if count == 0:
        raise UserError("the validation windows hold no token to predict; raise eval_windows")
    means = {name: total / count for name, total in totals.items()}
    first = {"val/loss": means.pop("loss"), "val/token_accuracy": means.pop("hits")}
    return first | {f"val/{name}": mean for name, mean in means.items()}


def prompt_accuracy(model: LanguageModel, params: Any, prompts: Prompts, **options) -> float:
    """Compute the mean score of prompts: by default the share whose new tokens end in the answer.

    A continuation that does not end within `context_length` new tokens scores 0. Options are those
    of `continuations`.
    """
    generated = continuations(model, params, prompts, **options)
    return float(np.mean(scores(generated, prompts, model.context_length)))


def scores(generated: Sequence[Continuation], prompts: Prompts, limit: int) -> list[float]:
    """Return the score of each continuation; 0 if it is empty or has not ended before `limit`."""
    pairs = zip(generated, prompts.answers, strict=False)
    return [
        prompts.score(new.tokens, answer) if 0 < len(new.tokens) < limit else 0.0
        for new, answer in pairs
    ]


def continuations(
    model: LanguageModel,
    params: Any,
    prompts: Prompts,
    *,
    limit: int | None = None,
    settings: Settings = Settings(),  # noqa: B008 (immutable)
    seed: int = 0,
    cut: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Continuation]:
    """Generate continuations of prompts, up to their end tokens.

    Args:
      model, params: the model from `create_model`, and its parameters.
      prompts: a prompt set of a data set.
      limit: the number of prompts, the first ones; None: all.
      settings: the generation settings; greedy by default.
      seed: the sampling seed.
      cut: wraps the iterable of the calls' first prompt indices, and may end it early.
    """
    chosen, generated = prompts.prompts[:limit], []
    for start in cut(range(0, len(chosen), PROMPTS_AT_ONCE)):
        part = chosen[start : start + PROMPTS_AT_ONCE]
        filled = part + [part[-1]] * (PROMPTS_AT_ONCE - len(part))  # one compiled shape
        new = generate(
            model,
            {"params": params},
            filled,
            model.context_length,
            settings,
            seed=seed + start,
            end_token=prompts.end,
            num_symbols=prompts.num_symbols,
        )
        generated += new[: len(part)]
    return generated


def evaluate_prompts(
    model: LanguageModel, params: Any, prompts: Mapping[str, Prompts], **options
) -> dict[str, float]:
    """Return `prompt_accuracy` of every prompt set by name; options are passed on."""
    return {name: prompt_accuracy(model, params, p, **options) for name, p in prompts.items()}
