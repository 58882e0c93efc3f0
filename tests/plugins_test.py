"""Parts of one's own: found by name, with options, recorded in the run, imported by its users."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages_helpers import ROOT, registered_here
from train_helpers import values

import nrgpt_jax as nrgpt
from nrgpt_jax import plugins
from nrgpt_jax.configs import default_config, set_fields
from nrgpt_jax.core.block import COMBINATIONS
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.metrics import METRICS
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.datasets import DATASETS
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_shapes
from nrgpt_jax.models.evaluators import EVALUATORS
from nrgpt_jax.registry import Registry
from nrgpt_jax.runs.directory import load_config, record_run
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.loop import train

PLUGIN = "plugin_parts"


@pytest.fixture(autouse=True)
def forgotten():
    """What the plugin registers, and the module itself, are forgotten after each test."""
    with registered_here():
        yield
    sys.modules.pop(PLUGIN, None)


def own_config(**changes):
    c = default_config()
    c.plugins = (PLUGIN,)
    c.update({"train_steps": 4, "log_every": 2, "eval_every": 4, "checkpoint_every": 4})
    c.update({"step_metrics": ("descent_rate",), "evaluators": ("confidence", "length_of_prompts")})
    c.model.update({"name": "NRGPT_H_HOPFIELD", "rule": "damped", "context_length": 8})
    c.model.update({"embed_dim": 8, "num_steps": 2, "mask": "strict"})
    c.model.update({"attention": "cosine", "combination": "weighted", "norm": "halved"})
    c.model.inference_rate = "tenth"
    c.data.update({"name": "reverse", "batch_size": 4})
    c.optimizer.name = "lion"
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.ci
def test_a_run_of_parts_of_ones_own(tmp_path, monkeypatch, standard_promotion):
    """Trained, with what they measure; opened where nothing was imported before."""
    options = {"model.options.K": 6, "model.options.power": 3.0, "data.options.length": 2}
    train(own_config(**options), tmp_path / "run")
    *_, line = values(tmp_path / "run")
    assert 0.2 <= line["val/confidence"] <= 1.0
    assert line["val/length_of_prompts"] == 3.0
    assert 0.0 <= line["val/accuracy"] <= 1.0
    logged = [record for record in values(tmp_path / "run") if "train/loss" in record]
    assert {"train/descent_rate/0", "train/descent_rate/1"} <= set(logged[0])
    record = json.loads((tmp_path / "run/config.json").read_text())["record"]
    assert set(record["parts"]) == {
        *("energy HOPFIELD", "energy cosine", "combination of energies weighted", "norm halved"),
        *("inference rate tenth", "rule of descent damped", "data set reverse"),
        *("step metric descent_rate", "evaluator confidence", "evaluator length_of_prompts"),
    }
    new_process()
    config = load_config(tmp_path / "run")
    shapes = parameter_shapes(create_model(config))
    assert shapes["block/feedforward/W"] == (8, 6)
    assert config.model.options.power == 3.0
    new_process()
    plugins.import_parts(record["parts"])  # of a run that names no plugin
    assert {"HOPFIELD", "cosine"} <= set(ENERGIES)
    new_process()
    monkeypatch.setitem(sys.modules, PLUGIN, None)  # as where it is not installed
    with pytest.raises(UserError, match=PLUGIN) as error:
        load_config(tmp_path / "run")
    assert "\n" not in str(error.value)


def new_process():
    """Nothing is registered, nothing imported."""
    parts: dict[str, Registry] = {
        "HOPFIELD": ENERGIES,
        "cosine": ENERGIES,
        "weighted": COMBINATIONS,
    }
    parts |= {"halved": NORMS, "tenth": RATES, "damped": RULES, "reverse": DATASETS}
    parts |= {"descent_rate": METRICS, "confidence": EVALUATORS, "length_of_prompts": EVALUATORS}
    for name, registry in parts.items():
        registry.remove(name)
    del sys.modules[PLUGIN]


@pytest.mark.ci
def test_options_change_what_an_energy_is(standard_promotion):
    plugins.load([PLUGIN])
    fields = {"name": "NRGPT_H_HOPFIELD", "vocab_size": 5, "embed_dim": 4, "num_steps": 1}
    models = [create_model(**fields, options={"K": 6, "power": p}) for p in (2.0, 3.0)]
    assert [model.sizes.length("K") for model in models] == [6, 6]
    tokens = jnp.arange(4)[None]
    variables = jax.jit(models[0].init)(jax.random.key(0), tokens)
    energies = [m.bind(variables).energies(tokens)["feedforward"][0] for m in models]
    block = variables["params"]["block"]
    bound = models[0].bind(variables)
    x = bound.embed(tokens)
    inputs, dynamics_at = bound.dynamics(x)
    g = dynamics_at(inputs).norm.function(x)
    hidden = jax.nn.relu(g @ block["feedforward"]["W"] + block["feedforward"]["b"][None, None])
    for power, energy in zip((2.0, 3.0), energies, strict=True):
        np.testing.assert_allclose(energy, -jnp.sum(hidden**power, axis=-1) / power, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model.options.powr": 3.0}, "model.options.powr"),
        ({"model.options.power": "three"}, "model.options.power"),
        ({"model.options.K": 0}, "model.options.K"),
        ({"data.options.size": 3}, "data.options.size"),
        ({"optimizer.options.b7": 0.9}, "optimizer.options.b7"),
        ({"optimizer.name": "lin"}, "optimizer.name"),
        ({"optimizer.name": "linear_schedule"}, "optimizer.name"),
        ({"optimizer.schedule": "adam"}, "optimizer.schedule"),
        ({"optimizer.name": "sophia"}, "optimizer.name"),  # needs a Hessian
        ({"optimizer.name": "scale_by_adam"}, "optimizer.name"),  # would climb
        ({"optimizer.options.b1": 0.9}, "optimizer.options.b1"),  # is optimizer.beta1
        ({"optimizer.name": "sgd", "optimizer.options.nesterov": "no"}, "nesterov"),
        ({"evaluators": ("nothing",)}, "evaluators"),
    ],
)
def test_a_wrong_option_is_named(changes, field):
    with pytest.raises(UserError) as error:
        check_config(own_config(**changes), 1)
    assert field in str(error.value)
    assert "\n" not in str(error.value)


def test_schedules_and_optimizers_of_optax():
    for changes in (
        {"optimizer.schedule": "linear_schedule"},
        {"optimizer.schedule": "polynomial_schedule", "optimizer.schedule_options.power": 2.0},
        {"optimizer.name": "sgd", "optimizer.options.momentum": 0.9},
        {"optimizer.name": "adafactor"},
    ):
        check_config(own_config(**changes), 1)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (None, "no_such_plugin"),
        ("raise RuntimeError('at import')", "at import"),
        (
            "import nrgpt_jax as n\nn.feedforward('FF1', {})(lambda params, g: g[0])",
            "registered already",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported(source, word, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = "no_such_plugin" if source is None else f"bad_{abs(hash(source))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(UserError) as error:
        plugins.load([name])
    assert name in str(error.value)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_another_definition_is_noticed(caplog):
    """Of layout and comments a checksum knows nothing."""
    parts: Registry = Registry("energy")
    scope: dict = {}

    def define(source):
        import linecache

        parts.clear()
        linecache.cache["<own>"] = (len(source), None, source.splitlines(True), "<own>")
        exec(compile(source, "<own>", "exec"), {"__name__": "own"}, scope)
        parts.add("E", scope["e"])
        return plugins.describe([(parts, "E")])

    first = define("def e(g):\n    return g * 2  # twice\n")
    assert first["energy E"]["module"] == "own"
    plugins.compare("runs/x", first, define("def e(g):\n\n    return g*2\n"))
    assert not caplog.records
    plugins.compare("runs/x", first, define("def e(g):\n    return g * 3\n"))
    (record,) = caplog.records
    assert "energy E" in record.getMessage()
    loop = "def e(g):\n    for i in (1, 2):\n        g += i\n{}g *= 2\n    return g\n"
    inside, outside = (define(loop.format(" " * width)) for width in (8, 4))
    assert inside != outside, "layout that changes the program"


def test_a_run_keeps_a_record_of_what_was_redefined(tmp_path):
    """Of a part that changed between two starts of a training."""
    config = own_config()
    plugins.load([PLUGIN])
    tokenizer = DATASETS["reverse"](config.data).tokenizer
    record_run(tmp_path, config, tokenizer)
    ENERGIES.sources["HOPFIELD"] = RULES.sources["damped"]  # another definition
    record_run(tmp_path, config, tokenizer, since_step=4)
    record = json.loads((tmp_path / "config.json").read_text())["record"]
    first, second = record["history"]
    assert not first["changes"]
    assert any("energy HOPFIELD" in change for change in second["changes"])


def test_names_of_options_are_of_one_meaning():
    """Across parts, and beside the letters of axes; each raises when the model is created."""
    matrix, fields = nrgpt.matrix, {"vocab_size": 5, "embed_dim": 4, "name": "NRGPT"}
    one = nrgpt.energy("ONE", {"W": matrix("D K")})
    one(lambda params, g, context, *, K=3: jnp.sum(g @ params["W"]))
    two = nrgpt.energy("TWO", {"W": matrix("D K")})
    two(lambda params, g, context, *, K=4: jnp.sum(g @ params["W"]))
    three = nrgpt.energy("THREE", {"W": matrix("D M")})
    three(lambda params, g, context, *, M=4: jnp.sum(g @ params["W"]))
    nrgpt.rule("untold", {"a": matrix("D Q")})(lambda params, eta, norm: None)
    for changes, field in (
        ({"energies": ("ONE", "TWO")}, "model.options.K"),
        ({"energies": ("THREE",)}, "model.options.M"),
        ({"energies": ("ONE",), "rule": "untold"}, "model.options.Q"),
    ):
        with pytest.raises(UserError) as error:
            create_model(**fields, **changes)
        assert field in str(error.value)
    both = create_model(**fields, energies=("ONE", "TWO"), options={"K": 6})
    assert parameter_shapes(both)["block/ONE/W"] == (4, 6)


def test_a_part_that_nobody_could_import_is_refused():
    """Such as one that an experiment file registers."""
    with pytest.raises(UserError, match="energy E"):
        plugins.check_importable({"energy E": {"module": "config_config", "checksum": ""}})
    plugins.check_importable({"energy E": {"module": PLUGIN, "checksum": ""}})


def test_options_are_set_whatever_was_done_to_a_configuration():
    config = default_config()
    config.unlock()
    config.lock()
    set_fields(config, {"model.options.power": 2, "seed": 3})
    set_fields(config, {"model.options.power": 2.5})
    assert (config.model.options.power, config.seed) == (2.5, 3)
    with pytest.raises(UserError, match="seed"):
        set_fields(config, {"seed": "three"})


def test_registering_again_replaces_the_same_function_only():
    source = (ROOT / "tests/plugin_parts.py").read_text()
    plugins.load([PLUGIN])
    exec(compile(source, str(ROOT / "tests/plugin_parts.py"), "exec"), {"__name__": PLUGIN})
    with pytest.raises(ValueError, match="registered already"):
        exec(compile(source, "elsewhere.py", "exec"), {"__name__": "elsewhere"})
    with pytest.raises(ValueError, match="the name is taken"):
        nrgpt.evaluator("loss")
