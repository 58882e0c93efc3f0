"""What every combination of registered parts must do: one suite for all of them."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import cached_logits, small_model
from marks import slow, slow_but

from nrgpt_jax.core.block import COMBINATIONS
from nrgpt_jax.core.energies import ENERGIES as REGISTERED
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.models import model_names
from nrgpt_jax.models.names import energies_labelled

TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
MASKS = ("strict", "inclusive")


def name_of(fields):
    if not isinstance(fields, dict):
        return None
    text = lambda v: "+".join(v) if isinstance(v, tuple) else str(v)
    return "-".join(text(v) for v in fields.values())


FEEDFORWARD = energies_labelled("feedforward")
PAPER = ("FF1", "FF2", "FF2W")
ENERGIES = [
    *itertools.product(PAPER, ("full_rank", "low_rank"), MASKS),
    *((name, "low_rank_rope", "strict") for name in FEEDFORWARD if name not in PAPER),
]
UPDATES = [pair for pair in itertools.product(NORMS, RATES) if pair != ("none", "gamma")]
QUICK = {
    row: (2 * i + 9) % len(UPDATES)
    for i, row in enumerate((0, 3, 5, 6, 9, 10, *range(12, len(ENERGIES))))
}


def combinations():
    """Every combination; all but a set that holds every energy, norm and rate are slow."""
    for i, (energies, update) in enumerate(itertools.product(ENERGIES, UPDATES)):
        (feedforward, attention, mask), (norm, rate) = energies, update
        fields = {"name": f"NRGPT_H_{feedforward}", "attention": attention, "mask": mask}
        fields |= {"norm": norm, "inference_rate": rate}
        row, column = divmod(i, len(UPDATES))
        quick = QUICK.get(row) == column
        yield pytest.param(fields, marks=[] if quick else pytest.mark.slow, id=name_of(fields))


BASELINES = [{"name": n, "mask": "inclusive"} for n in model_names() if not n.startswith("NRGPT")]
ADDITIONS: list[dict[str, Any]] = [
    {"attention": "full_rank_rope", "num_distinct_layers": 3},
    {"rule": "projected", "inference_rate": "psd", "norm": "layer_norm"},
    {"rule": "sphere", "inference_rate": "psd", "energies": ("injection",)},
    {"rule": "sphere", "inference_rate": "psd", "mask": "strict", "line_search": 2},
    {"per_step_scale": True, "learn_alpha": True, "learn_beta": True, "tied_head": True},
]
ALONE: list[dict[str, Any]] = [  # what is in TOGETHER, or much like the others
    {"attention": "low_rank_rope", "mask": "strict"},
    {"combination": "mixture"},
    {"energies": ("injection",)},
    {"energies": ("leak",), "mask": "strict"},
    {"rule": "momentum"},
    {"rule": "projected", "inference_rate": "full", "norm": "none"},
    {"num_distinct_layers": 2, "inference_rate": "psd"},
]
TOGETHER: dict[str, Any] = {
    "name": "NRGPT",
    "energies": ("low_rank_rope", "full_rank", "FF1", "FF2", "injection", "leak"),
    "combination": "mixture",
    "rule": "momentum",
    "num_distinct_layers": 2,
    "mask": "strict",
}
VARIATIONS: list[Any] = [
    *({"name": "NRGPT_H_FF2W", **fields} for fields in ADDITIONS),
    *(slow({"name": "NRGPT_H_FF2W", **fields}) for fields in ALONE),
    TOGETHER,
    slow({**TOGETHER, "implementation": "autodiff"}),
    {"name": "GPT_Rec", "num_distinct_layers": 2, "tied_head": True},
]


@pytest.mark.parametrize("fields", [*combinations(), *BASELINES, *VARIATIONS], ids=name_of)
def test_contract(fields):
    model, variables = small_model(**fields)
    traces = 0

    @jax.jit
    def logits_and_grads(variables, tokens):
        nonlocal traces
        traces += 1
        logits = model.apply(variables, tokens)
        # Of the prediction at position 3 with respect to every position's embedding.
        x = model.apply(variables, tokens, method="embed")
        at_3 = lambda x: jnp.sum(model.apply(variables, x, method="forward")[0].x[:, 3] ** 2)
        return logits, jax.grad(at_3)(x)

    logits, influence = logits_and_grads(variables, TOKENS)
    chex.assert_shape(logits, (2, 7, 11))
    chex.assert_type(logits, jnp.float32)
    chex.assert_tree_all_finite((logits, influence))
    reach = np.abs(influence).max(axis=(0, 2))
    assert (reach[:4] > 0).all(), "every earlier token is seen"
    assert (reach[4:] == 0).all(), "no later token is"
    changed = logits_and_grads(variables, TOKENS.at[:, 4:].set(3))[0]
    chex.assert_trees_all_equal(logits[:, :4], changed[:, :4])
    assert traces == 1, "a second call compiles nothing"
    for at_end, position, _ in cached_logits(model, variables, TOKENS, [2, 5]):
        chex.assert_trees_all_close(at_end, logits[np.arange(2), position], atol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("name", slow_but(["NRGPT_H_FF2W"], model_names()))
def test_jit_equals_no_jit(name):
    model, variables = small_model(name=name, num_steps=1)
    tokens = TOKENS[:, :3]
    with jax.disable_jit():
        plain = model.apply(variables, tokens)
    chex.assert_trees_all_close(jax.jit(model.apply)(variables, tokens), plain, atol=2e-5)


@pytest.mark.ci
@pytest.mark.parametrize(
    "fields",
    [
        slow(TOGETHER),
        {**ADDITIONS[1], "num_distinct_layers": 3},
    ],
    ids=name_of,
)
def test_models_by_rules_and_by_autodiff_are_the_same(fields):
    """The additions too: logits, and the gradients of every parameter."""
    found = []
    for implementation in ("fused", "autodiff"):
        model, variables = small_model(**fields, implementation=implementation)
        loss = lambda v, m=model: jnp.sum(m.apply(v, TOKENS) ** 2)
        found.append(jax.jit(jax.value_and_grad(loss))(variables))
    (value, grads), (expected, expected_grads) = found
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    chex.assert_trees_all_close(grads, expected_grads, rtol=0, atol=1e-3 * scale)


def test_every_registered_part_is_in_a_contract():
    """The slow product apart, what is registered later must be added above."""
    every = [*combinations(), *VARIATIONS]
    fields = [entry if isinstance(entry, dict) else entry.values[0] for entry in every]
    used = lambda key: {f[key] for f in fields if key in f}
    names = {energy for f in fields for energy in f.get("energies", ())}
    names |= used("attention") | {n.removeprefix("NRGPT_H_") for n in used("name")}
    assert set(REGISTERED) <= names
    assert set(COMBINATIONS) <= used("combination") | {"sum"}
    assert set(RULES) <= used("rule") | {"descent"}
    assert set(NORMS) == used("norm")
    assert set(RATES) == used("inference_rate")


def test_terms_of_one_label_have_names_of_their_own():
    model, variables = small_model(**TOGETHER)
    energies = jax.eval_shape(lambda v: model.apply(v, TOKENS, method="energies"), variables)
    assert set(energies) == {*TOGETHER["energies"], "total"}
    assert set(variables["params"]["block"]) >= set(TOGETHER["energies"])
