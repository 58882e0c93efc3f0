"""Studies: runs side by side are the runs one by one, and variants are what their tables say."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from train_helpers import TEXT, config_of

from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.loop import train
from studies import quality, runner
from studies.side_by_side import train_directories

QUALITY, REST = (importlib.import_module(f"experiments.{name}") for name in ("quality", "rest"))
REST_FILE = runner.ROOT / "experiments/rest.py"
SEEDS, RATES = (0, 3), (5e-3, 1e-2)


@pytest.fixture
def config(tmp_path):
    """Of a model with random depths, without dropout."""
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT)
    config = config_of(corpus)
    config.model.dropout = 0.0
    config.depth.update({"distribution": "uniform", "least": 1, "most": 4, "gradient_steps": 2})
    return config


@pytest.mark.slow
def test_runs_side_by_side_end_where_one_by_one_they_do(config, tmp_path, standard_promotion):
    config.optimizer.learning_rate = RATES[0]
    own = {(seed, rate): tmp_path / f"{seed}_{rate}" for seed in SEEDS for rate in RATES}
    train_directories(config.copy_and_resolve_references(), own)
    scale = config.optimizer.final_learning_rate / config.optimizer.learning_rate
    config.seed, config.optimizer.learning_rate = SEEDS[1], RATES[1]
    config.optimizer.final_learning_rate = scale * RATES[1]
    alone = tmp_path / "alone"
    found = train(config, alone)
    together = own[SEEDS[1], RATES[1]]
    assert runner.is_done(together)
    line = json.loads((together / "metrics.jsonl").read_text())
    assert line["val/loss"] == pytest.approx(found["val/loss"], rel=1e-3)
    loaded, trained = load_pretrained(together), load_pretrained(alone, "latest")
    assert loaded.config.seed == SEEDS[1]
    assert loaded.config.optimizer == trained.config.optimizer

    def distance(other):
        """Over all parameters together: single ones may follow the sign of noise."""
        leaves = [jax.tree.leaves(p.variables) for p in (loaded, load_pretrained(other, "latest"))]
        return sum(float(np.sum((a - b) ** 2)) for a, b in zip(*leaves, strict=True)) ** 0.5

    assert distance(alone) < 0.1 * distance(own[SEEDS[0], RATES[1]])
    assert distance(alone) < 0.1 * distance(own[SEEDS[1], RATES[0]])


@pytest.mark.parametrize("variant", QUALITY.variants())
def test_models_of_a_size_have_the_same_number_of_parameters(variant):
    config = QUALITY.get_config(variant)
    check_config(config, 1)
    size = variant.partition("_")[0]
    reference = QUALITY.parameters(QUALITY.get_config(f"{size}_GPT_Rec_parallel_muon").model)
    assert QUALITY.parameters(config.model) == pytest.approx(reference, rel=0.01)


def test_a_learning_rate_can_stand_behind_a_name():
    config = QUALITY.get_config("small_full@0.004")
    assert config.optimizer.learning_rate == pytest.approx(4e-3)
    assert config.optimizer.final_learning_rate == pytest.approx(4e-4)


@pytest.mark.parametrize("variant", REST.variants())
def test_every_way_to_rest_is_possible(variant):
    config = REST.get_config(variant)
    check_config(config, 1)
    config.model.vocab_size = 20
    create_model(config)


def test_a_page_has_every_variant_and_keeps_its_text():
    row = {"parameters": 1000, "learning_rate": 1e-3, "searched": {"0.001": 2.0}}
    found = {
        f"{size}_{way}": {**row, "losses": [value, value + 0.002]}
        for size in quality.SIZES
        for way, value in {"GPT_Rec_parallel_muon": 2.0, "full": 1.5}.items()
    }
    marks = [(quality.BEGIN.format(size), quality.END.format(size)) for size in quality.SIZES]
    text = "before\n" + "\nbetween\n".join(f"{begin}\n{end}" for begin, end in marks) + "\nafter"
    page = quality.page(found, quality.page(found, text))
    assert page.count("| `full` | 1,000 | 0.001 | 1.5010 ± 0.0014 | -0.500 |") == len(marks)
    assert page.index("`full`") < page.index("`GPT_Rec_parallel_muon`")
    lost = {"small_full": {**row, "losses": [1.5, None]}}
    assert "| 1.5000 (1 of 2) | +nan |" in quality.page(lost, text)
    assert page.startswith("before\n")
    assert "\nbetween\n" in page
    assert page.endswith("\nafter")


@pytest.mark.slow
def test_trainers_end_with_a_study_that_is_killed(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(
        "import os, signal\nfrom studies.runner import trainers\n"
        "if __name__ == '__main__':\n"
        "    with trainers(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(runner.ROOT)}
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -signal.SIGKILL
    worker = Path(f"/proc/{int(ended.stdout)}")
    for _ in range(60):
        if not worker.exists():
            return
        time.sleep(1.0)
    pytest.fail(f"{worker} is still there")


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    made = []

    def start(pool, experiment, runs, variant, seed):
        return pool.submit(lambda: made.append(1 // seed))

    @contextlib.contextmanager
    def threads(jobs):
        with ThreadPoolExecutor(jobs) as pool:
            yield pool

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner, "trainers", threads)
    monkeypatch.setattr(runner, "prepare", lambda configs: list(configs))
    chosen = {"only": ["listops_full"], "seeds": 3, "jobs": 1, "side_by_side": False}
    given: Any = SimpleNamespace(**chosen, runs=tmp_path)
    with pytest.raises(UserError, match="1 of 3 runs failed"):
        runner.train_all(REST_FILE, given)
    assert made == [1, 0]
    assert capsys.readouterr().out == "listops_full, seed 0: integer division or modulo by zero\n"


def test_what_cannot_be_side_by_side_is_said_before_it_is_trained(config, tmp_path):
    config.optimizer.schedule = "exponential"
    with pytest.raises(UserError, match=r"optimizer\.schedule='exponential' .* side by side"):
        train_directories(config, {(0, 1e-2): tmp_path / "run"})


@pytest.mark.slow
def test_a_training_that_diverges_has_no_loss_side_by_side(config, tmp_path, standard_promotion):
    del standard_promotion
    config.max_skipped_steps, config.optimizer.clip_norm = 2, 0.0
    own = {(0, rate): tmp_path / str(rate) for rate in (1e-2, 1e30)}
    train_directories(config, own)
    losses = [read_metrics(workdir)[-1]["val/loss"] for workdir in own.values()]
    assert losses[0] < 4.0
    assert losses[1] is None
