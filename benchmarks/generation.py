"""Measure the speed of generation; write docs/results/generation.md.

    python -m benchmarks.generation [--release=path/to/clone] [--models=GPT] [--out=page.md]

Compares, interleaved in one process: decoding with a KV cache, decoding that recomputes the whole
context for every token, and the authors' `generate`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.cases import Case
from nrgpt_jax import cli
from nrgpt_jax.generation.generate import Settings, cache_bytes, generate, stream
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models import create_model, model_names
from studies.tables import table, versions, write_page

NEW, PIECE, ROUNDS = 256, 32, 3
SETTINGS = Settings(Sampling(temperature=1.0), stride=1)

_RELEASE = flags.DEFINE_string("release", None, "Folder of a clone of the authors' release.")
_MODELS = flags.DEFINE_list("models", list(model_names()), "Models that are measured.")
_OUT = flags.DEFINE_string("out", None, "Where the page is written, if not in docs/.")


def build(name: str, **fields: Any):
    """Return the configuration, model and initial parameters of the small size."""
    config = Case("small", name, 16).config()
    config.model.update(fields)
    model = create_model(config)
    return config, model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))


@partial(jax.jit, static_argnums=0)
def recompute(model, variables, window_BxN, length, key):
    """Generate NEW tokens, recomputing the whole context for each, in one compiled loop."""

    def add(i, window_BxN):
        logits = model.apply(variables, window_BxN)[:, length + i - 1]
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return window_BxN.at[:, length + i].set(token.astype(jnp.int32), mode="drop")

    return jax.lax.fori_loop(0, NEW, add, window_BxN)


def seconds(quick: Callable[[], Any], slow: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the median seconds of ROUNDS calls of `quick`, and of one call of each slow function.

    The calls are interleaved, after a first call of `quick` that is not counted.
    """

    def measured(function):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - begin

    quick()
    others, times = [], [measured(quick)]
    for function in slow:
        others.append(measured(function))
        times.append(measured(quick))
    times += [measured(quick) for _ in range(ROUNDS - len(times))]
    return [statistics.median(times), *others]


def speed(name: str, batch: int, others: bool, clone: str | None, **fields: Any) -> list[str]:
    """Measure a row of the first table; with `others`, also the slow ways to generate."""
    config, model, variables = build(name, **fields)
    length, prompts = config.model.context_length, [np.array([1])] * batch
    cached = lambda: generate(model, variables, prompts, NEW, SETTINGS)
    slow: list[Callable[[], Any]] = []
    if others:
        arguments = variables, jnp.ones((batch, length), jnp.int32), 1, jax.random.key(0)
        compiled = recompute.lower(model, *arguments).compile()  # type: ignore[attr-defined]
        slow.append(lambda: compiled(*arguments))
        slow += [_their_generate(clone, config, batch)] if clone else []
    ours, *theirs = (batch * NEW / t for t in seconds(cached, slow))
    cells = [f"{other:,.0f}" for other in theirs]
    cells += [f"{ours / theirs[1]:.1f}"] if len(theirs) > 1 else []
    cells += [""] * (3 - len(cells))
    size = cache_bytes(model, variables, batch, length) / 1e6
    title = " ".join([name, *fields.values()])
    return [title, str(batch), f"{ours:,.0f}", *cells, f"{size:.2f}"]


def _their_generate(clone: str, config, batch: int) -> Callable[[], Any]:
    import torch

    from benchmarks.release import build as build_release

    model = build_release(clone, config).eval()
    prompt = torch.ones((batch, 1), dtype=torch.long, device=next(model.parameters()).device)

    def run():
        with torch.no_grad():
            return model.generate(prompt, NEW).cpu().numpy()

    return run


def by_position(batch: int) -> list[str]:
    """Measure milliseconds per token in pieces of `PIECE` tokens up to the context length."""
    _, model, variables = build("NRGPT_H_FF2W")
    prompts = [np.array([1])] * batch
    rounds = []
    for _ in range(1 + ROUNDS):
        begin, times = time.perf_counter(), []
        for _ in stream(model, variables, prompts, NEW - 1, SETTINGS, tokens_at_once=PIECE):
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
        rounds.append(times[1:-1])  # the first token reads the prompt; the last piece is shorter
    medians = np.median(np.array(rounds[1:]), axis=0) / PIECE
    return [f"{1e3 * t:.2f}" for t in medians]


def main() -> None:
    """Measure, print and write the page."""
    clone = _RELEASE.value
    rows = [speed(n, b, n == "NRGPT_H_FF2W", clone) for n in _MODELS.value for b in (1, 16)]
    rows += [speed("NRGPT_H_FF2W", b, False, clone, attention="low_rank") for b in (1, 16)]
    starts = [str(1 + PIECE * i) for i in range(NEW // PIECE - 1)]
    pieces = [*zip(starts, by_position(1), by_position(16), strict=True)]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    head = ["model", "batch", "cached", "recomputed", "release", "factor", "cache MB"]
    tables = {
        "speed": [f"Measured on {device} with {versions('jax')}.", "", *table(head, rows)],
        "position": table(["position", "1 text", "16 texts"], pieces),
    }
    write_page("generation", tables, Path(_OUT.value) if _OUT.value else None)
    print(*tables["speed"], "", *tables["position"], sep="\n")


if __name__ == "__main__":
    cli.run(main)
