"""What an experiment file says of its sweep, and what is changed in all of its runs."""

from pathlib import Path

import pytest

from nrgpt_jax.errors import UserError
from nrgpt_jax.sweeps.loading import load
from nrgpt_jax.training.config_checks import check_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("get_config = 1", r"has no get_sweep"),
        ("get_sweep = lambda scale: nope", r"e\.py, line 1: NameError: name 'nope'"),
        ("import nope", r"e\.py, line 1: ModuleNotFoundError"),
        ("get_sweep = lambda scale: {}", "has no runs"),
        ("get_sweep = lambda scale: {'a/0': 1}", "returns what default_config"),
        (
            "from nrgpt_jax.configs import default_config\n"
            "get_sweep = lambda scale: {'../0': default_config()}",
            "no name of a run",
        ),
    ],
)
def test_a_sweep_that_is_none_is_said_in_a_line(tmp_path, text, message):
    experiment = tmp_path / "e.py"
    experiment.write_text(text)
    with pytest.raises(UserError, match=message):
        load(experiment)
    with pytest.raises(UserError, match=r"there is no experiment .*; .* has e$"):
        load(tmp_path / "f.py")


@pytest.mark.ci
@pytest.mark.parametrize("name", [
    "listops_transition", "listops_transition:gpu", "listops_transition:paper", "overfitting",
    "rates", "rest", "shakespeare_scaling", "shakespeare_scaling:paper", "wikitext",
    "wikitext:gpu",
])  # fmt: skip
def test_every_sweep_is_possible(name):
    name, _, scale = name.partition(":")
    configs = load(ROOT / f"experiments/{name}.py", scale)
    for config in configs.values():
        check_config(config, 1)
    with pytest.raises(UserError, match="scale"):
        load(ROOT / f"experiments/{name}.py", "nope")


def test_fields_are_changed_in_all_runs_of_a_sweep():
    experiment = ROOT / "experiments/wikitext.py"
    configs = load(experiment, "gpu", changes={"data.path": "folder"})
    assert {config.data.path for config in configs.values()} == {"folder"}
    assert len({config.model.name for config in configs.values()}) == 4
    with pytest.raises(UserError, match=r"^seed differs between the runs"):
        load(experiment, "gpu", changes={"seed": 7})
    with pytest.raises(UserError, match="operations"):
        load(experiment, changes={"data.listops.operations": (5,)})
