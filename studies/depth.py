"""Accuracy against inference depth and KV cache: writes docs/results/depth.md.

python -m studies.depth --workdir=runs/listops [--prompts=400]
"""

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
from studies.measures import answered
from studies.tables import table, write_page

TOLERANCES = {"energy": (10.0, 3.0, 1.0, 0.3, 0.1, 0.01), "gradient": (10.0, 3.0, 1.0, 0.3, 0.1)}
STEPS = (0.6, 0.8, 1, 1.2, 2, 4)  # times the trained number of steps


def measure(trained: Pretrained, prompts: Prompts, limit: int) -> list[list[str]]:
    """Return the rows of the table."""
    T, rows = trained.model.num_steps, list[list[str]]()
    counts = [(round(n * T), cache) for n in STEPS for cache in ("exact", "fixed_point")]
    ways = [(f"{n} steps", Settings(num_steps=n, cache=cache)) for n, cache in counts]
    limits = [Convergence(most, name) for name, known in TOLERANCES.items() for most in known]
    for stop in limits:
        name = f"until converged, {stop.criterion}, {stop.tolerance:g}"
        ways.append((name, Settings(num_steps=4 * T, stopping=stop)))
    for name, settings in ways:
        share, taken = answered(trained, prompts, limit, **settings._asdict())
        mean = f"{taken.mean():.1f}" if settings.stopping else str(settings.num_steps)
        error = _error(trained, prompts, settings) if settings.cache == "fixed_point" else ""
        rows.append([name, settings.cache, f"{share:.1%}", mean, str(taken.max()), error])
        print(rows[-1], flush=True)
    return rows


def _error(trained: Pretrained, prompts: Prompts, settings: Settings) -> str:
    """Return the mean KL divergence from the exact cache, on texts generated with that cache."""
    deep = trained.model.with_num_steps(trained.variables, settings.num_steps or 1)
    chosen, decoding = prompts.prompts[:20], Decoding(settings.cache)
    end, symbols = prompts.end, prompts.num_symbols
    made = generate(*deep, chosen, 24, end_token=end, num_symbols=symbols)
    errors = [
        scoring.cache_error(*deep, np.concatenate([prompt, new.tokens]), len(prompt), decoding)
        for prompt, new in zip(chosen, made, strict=True)
    ]
    return f"{np.mean([error.divergence for error in errors]):.2g}"


def main(f: flags.FlagValues) -> None:
    """Measure, print and write the page."""
    trained = load_pretrained(f.workdir)
    sets = load_recorded(trained.config.data).prompts
    if not sets:
        raise UserError(f"the data set of {f.workdir} has no prompts to answer; use a listops run")
    name, prompts = next(iter(sets.items()))
    count = min(f.prompts, len(prompts.prompts))
    rows = measure(trained, prompts, count)
    write_page("depth", {"depth": lines(trained, name, count, rows)})


def lines(trained: Pretrained, name: str, count: int, rows: list[list[str]]) -> list[str]:
    """Return the description of the measurement, and the table."""
    head = ["depth", "cache", "answered", "mean steps", "most steps", "KL of the cache, nats"]
    m = trained.config.model
    return [
        f"{m.name}, D={m.embed_dim}, H={m.num_heads}, rate `{m.inference_rate}`, trained with "
        f"{m.num_steps} steps; {count} prompts of `{name}`, one seed. Guarantee of the rate: "
        f"{RATES[m.inference_rate].guarantee}.",
        "",
        *table(head, rows),
    ]


if __name__ == "__main__":
    cli.define_workdir_flag()
    flags.DEFINE_integer("prompts", 400, "Number of prompts.", 1)
    cli.run(lambda: main(flags.FLAGS))
