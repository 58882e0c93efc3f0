"""The paper's figures and tables, from trained sweeps: writes docs/results/paper.md.

    make sweep SWEEP=listops_transition && make sweep SWEEP=overfitting && make results

A section is measured if the runs of its sweep exist (`--runs`/NAME); the other sections keep their
numbers of results/results.json.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.runs.pretrained import load_pretrained
from studies.paper import cost, overfitting, records, samples, scaling, trajectories, transition
from studies.tables import DOCS, Record, Tables, load, write

TRANSITIONS = {
    "listops_transition": "modulo 5",
    "listops_transition-gpu": "modulo 10",
    "listops_transition-paper": "modulo 10, the paper's sizes and steps",
}
SCALING, JUDGE = "shakespeare_scaling", "GPT"
SCALINGS = (SCALING, "wikitext", "wikitext-gpu")
SWEEPS = (*TRANSITIONS, *SCALINGS, "overfitting")
SECTIONS: dict[str, ModuleType] = {
    **dict.fromkeys(TRANSITIONS, transition),
    **dict.fromkeys(SCALINGS, scaling),
    **{"overfitting": overfitting, "samples": samples, "cost": cost, "trajectories": trajectories},
}


def collect(runs: Path, name: str) -> list[Record]:
    """Return the records of a sweep; those of `TRANSITIONS` are limited to the best learning rates,
    and have the share of prompts answered."""
    found = records.of_sweep(runs / name)
    if name in TRANSITIONS:
        found = [run for cell in records.at_best_rates(found).values() for run in cell]
        for record in found:
            workdir = records.workdir_of(runs / name, record)
            record["answered"] = records.share_answered(workdir)
    return found


def sampled(runs: Path) -> dict[str, samples.Numbers]:
    """Measure samples of the models of the largest common width (seed 0), and of the corpus."""
    best = records.at_best_rates(records.of_sweep(runs / SCALING))
    widths = [{width for name, width in best if name == model} for model in scaling.COLOURS]
    largest = max(set.intersection(*widths), default=None)
    chosen = {model: cell[0] for (model, width), cell in best.items() if width == largest}
    if JUDGE not in chosen:
        return {}
    folder = lambda record: records.workdir_of(runs / SCALING, {**record, "seed": 0})
    trained = {model: load_pretrained(folder(record)) for model, record in chosen.items()}
    judge, title = trained[JUDGE], lambda model: f"`{model}`{', the judge' * (model == JUDGE)}"
    made = {title(model): samples.texts_of(one) for model, one in trained.items()}
    return samples.measure({**made, "the corpus": samples.real_texts(judge)}, judge)


def tables(found: dict[str, Any]) -> Tables:
    """Return the tables of all sections with results; the others stay as they are in the page."""
    return {name: SECTIONS[name].lines(of_sweep) for name, of_sweep in found.items() if of_sweep}


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the figures of the sections with results."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {title: found[name] for name, title in TRANSITIONS.items() if name in found}
    if tasks:
        transition.figure(tasks).savefig(folder / "listops_transition.png")
    for name in (SCALING, "overfitting", "trajectories"):
        if name in found:
            SECTIONS[name].figure(found[name]).savefig(folder / f"{name}.png")


def main(f: flags.FlagValues) -> None:
    """Read the sweeps, measure, and write the page and its figures."""
    found, runs = load("results"), Path(f.runs)
    for name in SWEEPS:
        found[name] = collect(runs, name) or found.get(name, [])
    found["trajectories"] = found.get("trajectories", {}) | trajectories.measure(runs)
    found["samples"] = sampled(runs) or found.get("samples", {})
    if f.cost or "cost" not in found:
        found["cost"] = cost.measure()
    found = {name: of_sweep for name, of_sweep in found.items() if of_sweep}
    write("results", found, tables)
    draw(found, DOCS / "figures")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "runs", "Where the sweeps are.")
    flags.DEFINE_boolean("cost", False, "Measure again what tokens cost; leave the machine alone.")
    cli.run(lambda: main(flags.FLAGS))
