"""Studies: variants are what their tables say, and what is trained is measured once."""

import importlib
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model
from nrgpt_jax.training.config_checks import check_config
from studies import quality, results, runner, tables

QUALITY, REST = (importlib.import_module(f"experiments.{name}") for name in ("quality", "rest"))


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


def test_a_page_has_every_variant_from_the_best_to_the_worst():
    row = {"parameters": 1000, "learning_rate": 1e-3, "searched": {"0.001": 2.0}}
    found = {
        f"small_{way}": {**row, "losses": [value, value + 0.002]}
        for way, value in {"GPT_Rec_parallel_muon": 2.0, "full": 1.5}.items()
    }
    *_, best, worst = quality.tables(found)["small"]
    assert best == "| `full` | 1,000 | 0.001 | 1.5010 ± 0.0014 | -0.500 |"
    assert worst.startswith("| `GPT_Rec_parallel_muon` |")
    lost = {"small_full": {**row, "losses": [1.5, None]}}
    assert quality.tables(lost)["small"][-1].endswith("| 1.5000 (1 of 2) | +nan |")


def test_tables_go_between_their_marks():
    marks = [f"{tables.BEGIN.format(n)}\nold\n{tables.END.format(n)}" for n in "ab"]
    text = "before\n" + "\nbetween\n".join(marks) + "\nafter"
    page = tables.filled(text, {"b": ["| new |"]})
    assert page == text.replace(marks[1], marks[1].replace("old", "\n| new |\n"))
    assert tables.filled(page, {"b": ["| new |"]}) == page
    with pytest.raises(ValueError, match="table of c"):
        tables.filled(text, {"c": []})


def test_raw_results_have_a_line_for_each_record():
    found = {"a": [{"x": 1, "y": [2, None]}, {"x": 3}], "b": []}
    assert json.loads(tables.dumped(found, 2)) == found
    assert '{"x": 1, "y": [2, null]},' in tables.dumped(found, 2).splitlines()


# Those of the transitions have intervals, which take seconds.
PAGES = ("benchmarks", "quality", "rates", "rest", "scaling", "signal", "results")


@pytest.mark.parametrize("name", PAGES)
def test_pages_show_the_raw_results(name):
    module = importlib.import_module("benchmarks.bench" if name == PAGES[0] else f"studies.{name}")
    kept, page = tables.load(name), tables.page_of(name).read_text()
    if name == "results":
        kept = {section: of for section, of in kept.items() if section not in results.TRANSITIONS}
    assert kept
    assert tables.filled(page, module.tables(kept)) == page


def test_a_study_measures_what_is_trained_once(tmp_path, monkeypatch):
    experiment = tmp_path / "study.py"
    experiment.write_text(
        "from nrgpt_jax.configs import default_config\n"
        "variants = lambda: ['a', 'b']\n"
        "get_config = lambda name: default_config()\n"
    )
    trained, seen = [], []

    def train_all(configs, f):
        trained.extend(configs)
        for workdir in configs:
            workdir.mkdir(parents=True, exist_ok=True)

    def measure(workdir):
        seen.append(workdir)
        return {"number": len(seen)}

    monkeypatch.setattr(runner, "train_all", train_all)
    monkeypatch.setattr(runner, "is_done", lambda workdir: workdir.name != "2")
    given: Any = SimpleNamespace(
        only=["a"], seeds=3, runs=tmp_path / "r", measure=True, again=False
    )
    found = runner.measure_all(experiment, measure, given)
    assert trained == [tmp_path / "r/a" / str(seed) for seed in range(3)]
    assert found == {"a": [{"number": 1}, {"number": 2}]}
    assert runner.measure_all(experiment, measure, given) == found
    assert len(seen) == 2


def test_a_learning_rate_with_which_training_diverges_is_not_taken(tmp_path, monkeypatch):
    losses = {0.0005: 2.0, 0.001: math.inf, 0.002: 1.5, 0.004: 1.8}

    def loss(workdir):
        return losses[float(workdir.parent.name.partition("@")[2])]

    monkeypatch.setattr(quality, "train_all", lambda configs, f, may_diverge: None)
    monkeypatch.setattr(quality, "loss", loss)
    given: Any = SimpleNamespace(runs=tmp_path, seeds=2, side_by_side=False)
    row = quality.tuned(["small_full"], given)["small_full"]
    assert row["learning_rate"] == 0.002
    assert row["losses"] == [1.5, 1.5]


def test_only_a_divergence_may_be_a_result(tmp_path, monkeypatch):
    why = {tmp_path / "a": "RunDiverged: at step 3"}
    monkeypatch.setattr(runner, "run_all", lambda *_, **__: why)
    monkeypatch.setattr(runner, "Watch", lambda configs: None)
    given: Any = SimpleNamespace(jobs=1, side_by_side=False, retry=False)
    configs: Any = {tmp_path / name: None for name in "ab"}
    runner.train_all(configs, given, may_diverge=True)
    with pytest.raises(UserError, match="at step 3"):
        runner.train_all(configs, given)
    why[tmp_path / "b"] = "OSError: no space left"
    with pytest.raises(UserError, match="no space left"):
        runner.train_all(configs, given, may_diverge=True)
