"""Evaluate a run on the whole validation split and on all its held-out prompts.

    python -m nrgpt_jax.evaluate --workdir=DIR [--checkpoint=best] [--num_steps=10]

Prints a table and writes it to DIR/evaluation.json.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli, disk, host, paths
from nrgpt_jax.core.block import CACHES
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.datasets.pipeline import validation_batches
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import Settings, check_settings
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models import LanguageModel, create_model, sharding
from nrgpt_jax.models.evaluators import chosen
from nrgpt_jax.runs.checkpoints import KINDS
from nrgpt_jax.runs.directory import load_config
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE, load_pretrained, read_params
from nrgpt_jax.runs.record_checks import check_tokenizer
from nrgpt_jax.training import evaluation

FILE_NAME = "evaluation.json"
TOKENS_AT_ONCE = 2**14  # per device


def evaluate(
    workdir: Path | str,
    checkpoint: str = "best",
    prompts: int = 0,
    num_steps: int | None = None,
    cache: str = "exact",
) -> dict[str, float]:
    """Compute the losses and accuracies of a run.

    Args:
      workdir: run directory, or an exported folder.
      checkpoint: `best` (lowest validation loss) or `latest`.
      prompts: number of prompts per prompt set; 0: all.
      num_steps: number of descent steps for losses and answers; None: as in training.
      cache: KV cache for the answers, `exact` or `fixed_point`.

    Returns:
      `val/loss` (nats per token), `val/token_accuracy`; for data sets with prompts
      `accuracy/<set>` (greedy) and `accuracy_sampled/<set>` (sampled at temperature 1).

    Raises:
      UserError: the model does not support N steps or the cache, or there are no prompts for it.
    """
    workdir = paths.as_path(workdir)
    config = load_config(workdir)
    dataset = load_recorded(config.data)
    check_tokenizer(workdir, config, dataset.tokenizer)
    model, mesh = create_model(config), sharding.make_mesh()
    check_settings(model, greedy := Settings(cache=cache, num_steps=num_steps))
    if cache != "exact" and not dataset.prompts:
        raise UserError(f"--cache={cache} is for answers, and this data set asks nothing")
    step, variables = _trained(workdir, checkpoint, model)
    model, variables = model.with_num_steps(variables, num_steps or model.num_steps)
    params = variables["params"]
    size, parts = _batch(config)
    options = parts, dataset.tokenizer.size, tuple(config.evaluators)
    eval_step = evaluation.make_eval_step(model, mesh, *options)
    windows = validation_batches(dataset.validation, config.model.context_length, size)
    metrics = evaluation.evaluate_loss(eval_step, params, windows, mesh)
    metrics |= {} if step is None else {"step": step}
    drawn = greedy._replace(sampling=Sampling(temperature=1.0))
    for name, settings in (("accuracy", greedy), ("accuracy_sampled", drawn)):
        scores = evaluation.evaluate_prompts(
            model, params, dataset.prompts, settings=settings, limit=prompts or None
        )
        metrics |= {f"{name}/{key}": value for key, value in scores.items()}
    for name, function in chosen(config.evaluators, "prompts").items():
        for key, part in dataset.prompts.items():
            metrics[f"val/{name}/{key}"] = float(function(model, params, part))
    return metrics


def _batch(config: ConfigDict) -> tuple[int, int]:
    """Return the batch size, a multiple of the number of devices, and its number of parts."""
    devices, length = jax.device_count(), config.model.context_length
    size = -(-config.data.batch_size // devices) * devices
    parts = -(-size // devices * length // TOKENS_AT_ONCE)
    return size, max(parts, config.optimizer.accumulation_steps)


def _trained(workdir: Path, checkpoint: str, model: LanguageModel) -> tuple[int | None, Any]:
    """Return the step of a run's checkpoint (None for an exported folder) and the variables."""
    if (workdir / WEIGHTS_FILE).exists():
        return None, load_pretrained(workdir).variables
    step, params = read_params(workdir, checkpoint, model)
    return step, {"params": params}


def report(metrics: Mapping[str, float]) -> str:
    """Format the losses as lines, and the accuracies as a table of prompt sets."""
    sets = [n.removeprefix("accuracy/") for n in metrics if n.startswith("accuracy/")]
    width = max(map(len, [*sets, "val/token_accuracy"]))
    lines = [f"{'step':<{width}}  {metrics['step']}"] if "step" in metrics else []
    lines += [
        f"{name:<{width}}  {metrics[name]:.4f}" for name in metrics if name.startswith("val/")
    ]
    if sets:
        lines += ["", f"{'accuracy':<{width}}  greedy  sampled at temperature 1"]
    for name in sets:
        greedy, drawn = (
            cli.percent(metrics[f"{a}/{name}"]) for a in ("accuracy", "accuracy_sampled")
        )
        lines.append(f"{name:<{width}}  {greedy:>6}  {drawn:>6}")
    return "\n".join(lines)


def main(
    workdir: str, checkpoint: str, prompts: int, num_steps: int | None = None, cache: str = "exact"
) -> None:
    """Print and write the metrics of `evaluate`."""
    host.cache_compilations(workdir)
    metrics = evaluate(workdir, checkpoint, prompts, num_steps, cache)
    print(report(metrics), flush=True)  # before writing, which fails on a full disk
    record = json.dumps({**metrics, "num_steps": num_steps, "cache": cache}, indent=1) + "\n"
    path = paths.as_path(workdir) / FILE_NAME
    disk.write_whole(path, record.encode())
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    _workdir = cli.define_workdir_flag()
    _checkpoint = flags.DEFINE_enum("checkpoint", "best", KINDS, "Which parameters.")
    _prompts = flags.DEFINE_integer("prompts", 0, "Answer N of each prompt set; 0: all.", 0)
    _num_steps = flags.DEFINE_integer("num_steps", None, "Steps of the descent; as in training.")
    _cache = flags.DEFINE_enum("cache", "exact", CACHES, "Of the answers, as in sample.")
    cli.run(
        lambda: main(
            _workdir.value, _checkpoint.value, _prompts.value, _num_steps.value, _cache.value
        )
    )
