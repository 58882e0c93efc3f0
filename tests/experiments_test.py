"""Experiments on large corpora: the paper's sizes, and every variant is possible."""

import importlib
import math

import pytest

from nrgpt_jax.models import create_model, parameter_shapes
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.config_notes import notes

LARGE = ["", "GPT", "GPT_Rec_parallel", "large", "small"]
VARIANTS = {"openwebtext": LARGE, "c4": LARGE, "wikitext": ["", "103", "small"]}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def config_of(name, variant):
    return importlib.import_module(f"experiments.{name}").get_config(variant)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_variant_is_possible_on_eight_devices(name, variant):
    config = config_of(name, variant)
    check_config(config, num_devices=8)
    assert config.experiment == config.data.name == name


@pytest.mark.parametrize(
    ("variant", "fields", "millions"),
    [
        ("", {}, 90.5),
        ("GPT", {}, 124.4),
        ("GPT", {"tied_head": False}, 163.1),
        ("GPT_Rec_parallel", {}, 85.2),
    ],
)
def test_models_on_openwebtext_have_the_parameters_of_the_paper(variant, fields, millions):
    config = config_of("openwebtext", variant)
    config.model.update(fields)
    shapes = parameter_shapes(create_model(config)).values()
    assert sum(math.prod(shape) for shape in shapes) / 1e6 == pytest.approx(millions, abs=0.1)
    tokens = config.data.batch_size * config.model.context_length
    assert (tokens, config.train_steps) == (393_216, 100_000)


SWEPT = ("listops_transition", "shakespeare_scaling", "overfitting", "wikitext", "rates", "rest")


@pytest.mark.parametrize("name", [*SWEPT, "listops", "shakespeare", "quality", "text"])
def test_experiments_do_what_their_settings_say(name):
    module = importlib.import_module(f"experiments.{name}")
    configs = list(module.get_sweep("").values()) if name in SWEPT else [module.get_config()]
    assert not [note for config in configs for note in notes(config, windows=10**6)]
