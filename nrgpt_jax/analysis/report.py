"""Output of an analysis: figures, numbers, a page, and a text report."""

import json
from pathlib import Path

import numpy as np

from nrgpt_jax import disk, paths
from nrgpt_jax.analysis.examination import Analysis, as_numbers, examine
from nrgpt_jax.analysis.figures import FIGURES
from nrgpt_jax.analysis.webpage import webpage
from nrgpt_jax.cli import percent
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.certificates import LINE_SEARCH
from nrgpt_jax.core.convergence import MARGIN
from nrgpt_jax.core.evidence import SCALES
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained

TOKENS = 64  # of the validation split, if no text is given
USUAL = default_config().model


def analyze(
    workdir: Path | str,
    prompt: str | None = None,
    *,
    num_steps: int | None = None,
    tolerance: float = 1e-2,
    checkpoint: str = "best",
    out: Path | str | None = None,
) -> Analysis:
    """Analyze a text and write figures, numbers and a page.

    Args:
      workdir: a run directory or an exported folder.
      prompt: the text; None: the first 64 tokens of the run's validation split.
      num_steps: number of descent steps; None: four times the number in training.
      tolerance: a token has converged if a step changes its g by no more, relative.
      checkpoint: checkpoint of a run directory, `best` or `latest`.
      out: output folder; None: `analysis` in the run directory.

    Raises:
      UserError: the run does not exist, has no energy, or the text does not fit.
      OSError: the folder cannot be written.
    """
    trained, result = look(workdir, prompt, num_steps, tolerance, checkpoint)
    folder = paths.on_this_machine(workdir if out is None else out)
    write(folder / "analysis" if out is None else folder, result, title(trained))
    return result


def look(
    workdir: Path | str,
    prompt: str | None,
    num_steps: int | None,
    tolerance: float,
    checkpoint: str,
) -> tuple[Pretrained, Analysis]:
    """Return the model and its analysis, not written; arguments and errors as in `analyze`."""
    trained = load_pretrained(workdir, checkpoint)
    tokens = trained.tokenizer.encode(prompt) if prompt is not None else _validation_text(trained)
    return trained, examine(trained, tokens, num_steps=num_steps, tolerance=tolerance)


def write(folder: Path, result: Analysis, heading: str) -> None:
    """Write figures, numbers and a page, each file atomically. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with disk.replacing(folder / f"{name}.png") as partial:
            draw(result).savefig(partial, format="png")
    disk.write_whole(folder / "analysis.json", json.dumps(as_numbers(result)).encode())
    page = webpage(result, heading, report(result))
    disk.write_whole(folder / "analysis.html", page.encode("utf-8", "replace"))


def _validation_text(trained: Pretrained) -> np.ndarray:
    data, length = trained.config.data, trained.model.context_length
    try:
        validation = load_recorded(data).validation
        return validation.read(0, min(TOKENS, length, len(validation)))[0].astype(np.int32)
    except UserError as error:
        raise UserError(f"{error}; or give a text of yours: --prompt=...") from None


def title(trained: Pretrained) -> str:
    """Return a one-line description of a model."""
    m, data = trained.config.model, trained.config.data.name
    extra = [f"and {', '.join(m.energies)}"] if m.energies else []
    extra += [
        f"{field} {m[field]}" for field in ("combination", "rule") if m[field] != USUAL[field]
    ]
    extra += (
        [f"{trained.model.num_distinct_layers} blocks"]
        if trained.model.num_distinct_layers > 1
        else []
    )
    return (
        f"{m.name} on {data}: D={m.embed_dim}, H={m.num_heads}, T={m.num_steps}, "
        f"rate {m.inference_rate}, norm {m.norm}, mask {m.mask}"
    ) + "".join(f", {part}" for part in extra)


def report(result: Analysis) -> str:
    """Return the guarantee of descent and the evidence for it as text."""
    c, steps = result.certificate, result.num_steps
    lines = [contradiction(result)] if c.contradicted else []
    if c.proposition:
        which = "any step" if c.proposition == LINE_SEARCH else "any sufficiently small step"
        lines.append(
            f"Descent: guaranteed by {_name(c.proposition)} ({c.reason}): a token's energy does "
            f"not rise in {which} while its context is held fixed."
        )
    else:
        lines.append(f"Descent: NOT guaranteed ({c.reason}).")
    if c.dtype != "float32":
        lines.append(f"The model computes in {c.dtype}; its rounding is not included here.")
    shown = "is fixed" if c.mask == "strict" else "and its own key are fixed"
    lines += [
        f"Inference rate eta ({c.rate}): the eigenvalues of its symmetric part are between "
        f"{c.smallest_eigenvalue:.4g} and {c.largest_eigenvalue:.4g}.",
        f"Steps of {len(result.tokens)} tokens, {steps} each ({result.trained_steps} in training), "
        f"while a token's context {shown}:",
        f"  directed uphill              {percent(c.uphill)}",
        f"  with a higher energy after   {percent(c.rises)}",
        f"  largest that descend         {_longest(c.largest_step_scale)}",
        f"Convergence (g changes by at most {result.tolerance:.3g}, relative, in a step):",
        f"  converged tokens             {int(np.sum(result.settled < steps))} of "
        f"{len(result.tokens)}",
        f"  steps in converged contexts  {c.steps_converged}"
        + (f", energy higher after {percent(c.rises_converged)}" if c.steps_converged else ""),
    ]
    if result.attraction is not None and np.isfinite(result.attraction.radius).all():
        near, radius = result.attraction.attracts(result.tolerance).sum(), result.attraction.radius
        lines += [
            f"Fixed points after step {steps} (each token's own block of the step's Jacobian):",
            f"  converged and attracting     {near} of {len(result.tokens)} (spectral radius below "
            f"{1 - MARGIN:g})",
            f"  spectral radius              {np.median(radius):.3g} (median), {radius.max():.3g} "
            "(largest), by power iteration",
        ]
    if result.diverged_at is not None:
        lines.append(f"Energies diverge at step {result.diverged_at}; later steps are not shown.")
    return "\n".join(lines)


def contradiction(result: Analysis) -> str:
    """Return the message for measurements that contradict the guarantee."""
    c = result.certificate
    return (
        f"The guarantee by {_name(c.proposition)} is contradicted: {c.contradicted} of "
        f"{result.speeds.size} token steps lead uphill; a part of the model does not have the "
        "properties that it declares"
    )


def _name(proposition: str | None) -> str:
    """The source of a guarantee, in a sentence."""
    return "its line search" if proposition == LINE_SEARCH else f"Proposition {proposition}"


def _longest(scale: float) -> str:
    if scale == 0.0:
        return f"none: energy increases even at {min(SCALES):.2g} times the model's step"
    if np.isinf(scale):
        return f"all that were tried, up to {max(SCALES):g} times the model's step"
    return f"{scale:.3g} times the model's step"
