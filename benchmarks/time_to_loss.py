"""Measure the time to a validation loss beside nanoGPT; write docs/results/time_to_loss.md.

    python -m benchmarks.time_to_loss --nanogpt=path/to/clone [--rounds=2]

The sides train tiny Shakespeare in turn, each by its own command. The time is that of the whole
process: start-up, compilation, evaluations and checkpoints included. The validation loss is then
computed on the same whole validation split, in windows of 64 characters. The clone is one of
github.com/karpathy/nanoGPT; it needs torch in the same environment.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags

from nrgpt_jax import cli, load_pretrained
from nrgpt_jax.datasets.corpora import SHAKESPEARE_SHA256, SHAKESPEARE_URL
from nrgpt_jax.datasets.download import fetch
from studies.tables import ROOT, table, versions, write_page

WINDOW = 64
# The README of nanoGPT, "I only have a macbook": its recipe for CPUs.
RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
OURS = "shakespeare:quick"

_CLONE = flags.DEFINE_string("nanogpt", None, "Folder of a clone of nanoGPT.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Trainings of each side.", 1)


def timed(command: list[str], where: Path, log: Path) -> float:
    """Run a command and return its seconds."""
    begin = time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(command, cwd=where, stdout=out, stderr=out, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{log.read_text()[-2000:]}")
    return time.perf_counter() - begin


def nanogpt(clone: Path, folder: Path) -> dict[str, float]:
    """Train nanoGPT once by its recipe; return seconds, loss and number of parameters."""
    data = clone / "data/shakespeare_char"
    if not (data / "val.bin").exists():
        where = fetch("shakespeare/input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256)
        (data / "input.txt").write_bytes(where.read_bytes())
        subprocess.run([sys.executable, str(data / "prepare.py")], check=True)
    command = [sys.executable, "train.py", *RECIPE.split(), f"--out_dir={folder}"]
    seconds = timed(command, clone, folder / "log")
    loss, count = _nanogpt_loss(clone, folder / "ckpt.pt", np.fromfile(data / "val.bin", np.uint16))
    return {"seconds": seconds, "loss": loss, "parameters": count}


def _nanogpt_loss(clone: Path, checkpoint: Path, tokens: np.ndarray) -> tuple[float, int]:
    import torch

    sys.path.insert(0, str(clone))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    ids, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, WINDOW):
            window = ids[start : start + WINDOW + 1][None]
            total += float(model(window[:, :-1], window[:, 1:])[1]) * (window.shape[1] - 1)
    return total / (len(ids) - 1), model.get_num_params(non_embedding=False)


def ours(folder: Path) -> dict[str, float]:
    """Train the experiment once; return seconds, loss and number of parameters."""
    config = f"--config=experiments/{OURS.replace(':', '.py:')}"
    run = f"--workdir={folder}"
    seconds = timed([sys.executable, "-m", "nrgpt_jax.train", config, run], ROOT, folder / "log")
    timed([sys.executable, "-m", "nrgpt_jax.evaluate", run], ROOT, folder / "evaluate.log")
    loss = json.loads((folder / "evaluation.json").read_text())["val/loss"]
    _, variables, *_ = load_pretrained(folder)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {"seconds": seconds, "loss": loss, "parameters": count}


def lines(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the description of the machine, and a table with a row per side."""
    rows = []
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        losses = " ".join(f"{run['loss']:.3f}" for run in runs)
        cells = [f"{runs[0]['parameters']:,}", f"{statistics.median(seconds):.0f}"]
        rows.append([name, *cells, " ".join(f"{s:.0f}" for s in seconds), losses])
    head = ["training", "parameters", "seconds, median", "each", "validation loss"]
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {versions('jax', 'torch')}"
    return [f"Measured on {machine}.", "", *table(head, rows)]


def main() -> None:
    """Train the sides in turn, print and write the page."""
    clone = Path(_CLONE.value).resolve()
    if not (clone / "config/train_shakespeare_char.py").exists():
        raise SystemExit(f"error: {clone} is not a clone of github.com/karpathy/nanoGPT")
    sides: dict[str, Callable[[Path], dict[str, float]]] = {"nanoGPT": partial(nanogpt, clone)}
    sides[OURS] = ours
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for name in [*sides] * _ROUNDS.value:
        with tempfile.TemporaryDirectory() as folder:
            found[name].append(sides[name](Path(folder)))
        print(name, found[name][-1], flush=True)
    write_page("time_to_loss", {"time_to_loss": lines(found)})


if __name__ == "__main__":
    cli.run(main)
