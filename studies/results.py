"""The paper's figures and tables from what sweeps have trained: writes docs/results.md.

    make sweep SWEEP=listops_transition && make sweep SWEEP=overfitting && make results

Each section is written where its runs are there (`--runs`/NAME of the sweep); the numbers of the
others stay as docs/results.json has them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from nrgpt_jax import cli, disk
from nrgpt_jax.runs.pretrained import load_pretrained
from studies.paper import cost, overfitting, records, samples, scaling, trajectories, transition
from studies.paper.records import Record
from studies.runner import ROOT

DOCS = ROOT / "docs"
TRANSITIONS = {
    "listops_transition": "modulo 5",
    "listops_transition-gpu": "modulo 10",
    "listops_transition-paper": "modulo 10, the paper's sizes and steps",
}
SCALING, JUDGE = "shakespeare_scaling", "GPT"
SCALINGS = (SCALING, "wikitext", "wikitext-gpu")
SWEEPS = (*TRANSITIONS, *SCALINGS, "overfitting")
BEGIN, END = "<!-- table of {} -->", "<!-- end of the table of {} -->"


def collect(runs: Path, name: str) -> list[Record]:
    """The records of a sweep; where prompts are answered, of the runs that are shown."""
    found = records.of_sweep(runs / name)
    if name in TRANSITIONS:
        shown = [run for cell in records.at_best_rates(found).values() for run in cell]
        for record in shown:
            variant = f"{record['model']}_{record['size']}@{record['rate']:g}"
            record["answered"] = records.answered(runs / name / variant / str(record["seed"]))
            print(name, variant, record["seed"], record["answered"], flush=True)
        return shown
    return found


def sampled(runs: Path) -> dict[str, samples.Numbers]:
    """What the models of the largest width write, and the corpus; seed 0 of each."""
    best = records.at_best_rates(records.of_sweep(runs / SCALING))
    widths = [{width for name, width in best if name == model} for model in scaling.COLOURS]
    common = set.intersection(*widths)
    largest = {
        model: load_pretrained(runs / SCALING / f"{model}_{width}@{cell[0]['rate']:g}" / "0")
        for (model, width), cell in sorted(best.items())
        if common and width == max(common)
    }
    if JUDGE not in largest:
        return {}
    judge, title = largest[JUDGE], lambda model: f"`{model}`{', the judge' * (model == JUDGE)}"
    made = {title(model): samples.texts_of(trained) for model, trained in largest.items()}
    return samples.measure({**made, "the corpus": samples.real_texts(judge)}, judge)


def page(found: dict[str, Any], text: str) -> str:
    """docs/results.md with the tables in their places; where nothing was found it stays."""
    writers: dict[str, Callable[[Any], list[str]]] = dict.fromkeys(TRANSITIONS, transition.lines)
    writers |= dict.fromkeys(SCALINGS, scaling.lines)
    writers |= {"overfitting": overfitting.lines}
    writers |= {"samples": samples.lines, "cost": cost.lines, "trajectories": trajectories.lines}
    for name, of_sweep in found.items():
        if not of_sweep:
            continue
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        lines = writers[name](of_sweep)
        text = "\n".join([before + begin, "", *lines, "", end + after])
    return text


def draw(found: dict[str, Any], folder: Path) -> None:
    """Writes the figures of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {title: found[name] for name, title in TRANSITIONS.items() if name in found}
    if tasks:
        transition.figure(tasks).savefig(folder / "listops_transition.png")
    sections = {SCALING: scaling, "overfitting": overfitting, "trajectories": trajectories}
    for name, section in sections.items():
        if name in found:
            section.figure(found[name]).savefig(folder / f"{name}.png")


def main(f: flags.FlagValues) -> None:
    """Reads, measures, writes."""
    kept = DOCS / "results.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in SWEEPS:
        found[name] = collect(Path(f.runs), name) or found.get(name, [])
    found["trajectories"] = found.get("trajectories", {}) | trajectories.measure(Path(f.runs))
    found["samples"] = sampled(Path(f.runs)) or found.get("samples", {})
    if f.cost or "cost" not in found:
        found["cost"] = cost.measure()
    found = {name: of_sweep for name, of_sweep in found.items() if of_sweep}
    disk.write_whole(kept, (json.dumps(found) + "\n").encode())
    text = page(found, (DOCS / "results.md").read_text())
    draw(found, DOCS / "figures")
    (DOCS / "results.md").write_text(text)
    print(f"written to {DOCS / 'results.md'}")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "runs", "Where the sweeps are.")
    flags.DEFINE_boolean("cost", False, "Measure what tokens cost anew; leave the machine alone.")
    cli.run(lambda: main(flags.FLAGS))
