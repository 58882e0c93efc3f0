"""How accuracy depends on the depth at inference and on the cache: writes docs/depth.md.

python -m studies.depth --workdir=runs/listops [--prompts=400]
"""

from pathlib import Path

import numpy as np
from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.core.descent import Convergence
from nrgpt_jax.core.rules import RATES
from nrgpt_jax.datasets import Prompts, load_recorded
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation import scoring
from nrgpt_jax.generation.generate import Settings, generate
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from nrgpt_jax.training import evaluation
from studies.tables import table

TOLERANCES = {"energy": (10.0, 3.0, 1.0, 0.3, 0.1, 0.01), "gradient": (10.0, 3.0, 1.0, 0.3, 0.1)}
STEPS = (0.6, 0.8, 1, 1.2, 2, 4)  # times those of training
OUT = Path(__file__).resolve().parent.parent / "docs/depth.md"


def answer(trained: Pretrained, prompts: Prompts, settings: Settings) -> tuple[float, np.ndarray]:
    """The share of prompts answered, and the steps of every generated token."""
    model, params = trained.model, trained.variables["params"]
    made = evaluation.continuations(model, params, prompts, settings=settings)
    hits = evaluation.scores(made, prompts, model.context_length)
    return float(np.mean(hits)), np.concatenate([n.steps for n in made])


def measure(trained: Pretrained, prompts: Prompts) -> list[list[str]]:
    """The table."""
    steps = trained.model.num_steps
    found = []
    for times in STEPS:
        for cache in ("exact", "fixed_point"):
            count = round(times * steps)
            settings = Settings(num_steps=count, cache=cache)
            accuracy, _ = answer(trained, prompts, settings)
            error = _error(trained, prompts, settings) if cache == "fixed_point" else ""
            found.append(
                [f"{count} steps", cache, f"{accuracy:.1%}", str(count), str(count), error]
            )
            print(found[-1], flush=True)
    for criterion, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            settings = Settings(num_steps=4 * steps, stopping=Convergence(tolerance, criterion))
            accuracy, taken = answer(trained, prompts, settings)
            name = f"until converged, {criterion}, {tolerance:g}"
            spread = [f"{taken.mean():.1f}", str(taken.max())]
            found.append([name, "exact", f"{accuracy:.1%}", *spread, ""])
            print(found[-1], flush=True)
    return found


def _error(trained: Pretrained, prompts: Prompts, settings: Settings) -> str:
    """Mean KL divergence from the exact cache on texts the exact cache made."""
    model, variables = trained.model.with_num_steps(trained.variables, settings.num_steps or 1)
    chosen, total = prompts.prompts[:20], 0.0
    ends = prompts.end, prompts.num_symbols
    made = generate(model, variables, chosen, 24, end_token=ends[0], num_symbols=ends[1])
    for prompt, new in zip(chosen, made, strict=True):
        text = np.concatenate([prompt, new.tokens])
        decoding = Decoding(settings.cache)
        total += scoring.cache_error(model, variables, text, len(prompt), decoding).divergence
    return f"{total / len(chosen):.2g}"


def main(f: flags.FlagValues) -> None:
    """Measures, prints, writes."""
    trained = load_pretrained(f.workdir)
    sets = load_recorded(trained.config.data).prompts
    if not sets:
        raise UserError(f"the data set of {f.workdir} has no prompts to answer; use a listops run")
    name, prompts = next(iter(sets.items()))
    first = slice(f.prompts)
    prompts = prompts._replace(prompts=prompts.prompts[first], answers=prompts.answers[first])
    OUT.write_text(page(trained, name, len(prompts.prompts), measure(trained, prompts)))
    print(f"written to {OUT}")


def page(trained: Pretrained, name: str, count: int, rows: list[list[str]]) -> str:
    """docs/depth.md"""
    head = ["depth", "cache", "answered", "mean steps", "most steps", "KL of the cache, nats"]
    m = trained.config.model
    text = [
        "# Depth at inference",
        "",
        "Written by `python -m studies.depth --workdir=runs/listops`, after",
        "`make train EXP=listops`. The share of held-out prompts answered, greedy, with another",
        "number of steps than in training, with tokens that stop when they have converged",
        f"(at most {4 * m.num_steps} steps; the tolerance is the change of a token's energy in a",
        "step, or the norm of its gradient), and with one remembered state a token.",
        "",
        f"What the rate `{m.inference_rate}` promises: {RATES[m.inference_rate].guarantee}.",
        "",
        f"{m.name}, D={m.embed_dim}, H={m.num_heads}, rate `{m.inference_rate}`, trained with "
        f"{m.num_steps} steps; {count} prompts of `{name}`, one seed.",
        "",
        *table(head, rows),
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    cli.define_workdir_flag()
    flags.DEFINE_integer("prompts", 400, "Answer so many.", 1)
    cli.run(lambda: main(flags.FLAGS))
