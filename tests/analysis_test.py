"""An analysis says what the model does, its numbers and figures are complete."""

import json

import jax
import numpy as np
import pytest
from decoding_helpers import first_dynamics, pretrained

from nrgpt_jax.analysis.examination import as_numbers, examine, symbols_of
from nrgpt_jax.analysis.figures import FIGURES
from nrgpt_jax.analysis.landscape import landscape
from nrgpt_jax.analysis.report import report
from nrgpt_jax.cli import percent
from nrgpt_jax.core.block import energy_and_grad, start, update_cache
from nrgpt_jax.datasets.tokenizers import ByteTokenizer
from nrgpt_jax.errors import UserError
from studies.tables import spread

TOKENS = np.array([0, 3, 1, 4, 1, 5, 9, 2])


@pytest.fixture(scope="module")
def descending():
    trained = pretrained(mask="strict", norm="layer_norm", inference_rate="gamma")
    return trained, examine(trained, TOKENS, num_steps=7)


def test_predictions_are_the_models_own(descending):
    trained, found = descending
    logits = jax.jit(trained.model.apply)(trained.variables, TOKENS[None])[0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    seen, depth = found.predictions, trained.model.num_steps
    assert found.depth == depth
    np.testing.assert_array_equal(seen.tokens[depth, :, 0], log_p.argmax(axis=-1))
    np.testing.assert_allclose(seen.probabilities[depth, :, 0], np.exp(log_p.max(axis=-1)), 1e-4)
    entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
    np.testing.assert_allclose(seen.entropy[depth], entropy, rtol=1e-4)
    follows = -log_p[np.arange(7), TOKENS[1:]]
    np.testing.assert_allclose(seen.surprise[depth], follows, rtol=1e-4)
    assert seen.agreement[depth].all()
    assert seen.agreement.shape == (8, 8)
    expected = seen.tokens[..., 0] == seen.tokens[depth, :, 0]
    np.testing.assert_array_equal(seen.agreement, expected)


def test_path_and_motion(descending):
    trained, found = descending
    of_model = lambda v: trained.model.apply(v, TOKENS[None], method="energies")
    energies = jax.jit(of_model)(trained.variables)
    depth = trained.model.num_steps
    for name, values in energies.items():
        np.testing.assert_allclose(
            found.path.energies[name][: depth + 1], values[:, 0], rtol=1e-4, atol=1e-5
        )
    moved = np.linalg.norm(found.path.states[4] - found.path.states[3], axis=-1)
    np.testing.assert_allclose(found.step_norms[3], moved, rtol=1e-6)
    assert found.num_steps == 7
    assert found.symbols == list("adbebfjc")
    assert all(0 <= s <= 7 for s in found.settled)


@pytest.mark.ci
def test_certificates_tell_models_apart(descending):
    _, found = descending
    assert found.certificate.proposition == "2.1"
    assert found.certificate.uphill == 0.0
    assert found.certificate.smallest_eigenvalue < found.certificate.largest_eigenvalue
    assert "guaranteed by Proposition 2.1" in report(found)
    full = examine(pretrained(mask="strict", inference_rate="full"), TOKENS, num_steps=4)
    assert full.certificate.proposition is None
    assert full.certificate.uphill > 0.1
    assert full.certificate.smallest_eigenvalue < 0.0
    assert full.certificate.largest_step_scale == 0.0
    assert "NOT guaranteed" in report(full)


def test_attraction_is_that_of_the_step_after_the_last(descending):
    _, found = descending
    x, move = found.path.states[-1], found.path.moves[-1]
    centred = lambda x: x - x.mean(axis=-1, keepdims=True)
    unit = lambda x: centred(x) / centred(x).std(axis=-1, keepdims=True)
    moved = np.linalg.norm(unit(x + move) - unit(x), axis=-1)
    wanted = moved / np.linalg.norm(unit(x), axis=-1)
    np.testing.assert_allclose(found.attraction.speed, wanted, rtol=2e-2, atol=1e-5)
    near = int(np.sum((found.attraction.speed <= 0.01) & (found.attraction.radius < 0.99)))
    assert f"converged and attracting     {near} of" in report(found)


@pytest.mark.slow
def test_attraction_is_not_asked_of_more_than_states():
    for fields in ({"rule": "momentum"}, {"num_distinct_layers": 2}):
        found = examine(pretrained(**fields), TOKENS, num_steps=2)
        assert found.attraction is None
        assert "attracting" not in report(found)


@pytest.mark.ci
def test_divergence_is_said_and_cut_off():
    """Without a norm the energies of this model have no lower bound."""
    found = examine(
        pretrained(mask="strict", norm="none", inference_rate="scalar"), TOKENS, num_steps=60
    )
    assert found.diverged_at is not None
    assert found.num_steps == found.diverged_at - 1
    assert np.isfinite(found.path.states).all()
    assert found.certificate.proposition == "2.2"
    assert f"diverge at step {found.diverged_at}" in report(found)
    json.dumps(as_numbers(found), allow_nan=False)
    for draw in FIGURES.values():
        draw(found)


def test_divergence_in_the_first_step_is_an_error():
    trained = pretrained(mask="strict", norm="none", inference_rate="scalar")
    params = {**trained.variables["params"]}
    params["block"] = {**params["block"], "rate": {"log_c": np.float32(25.0)}}
    with pytest.raises(UserError, match="diverge in the first step"):
        examine(trained._replace(variables={"params": params}), TOKENS, num_steps=4)


def test_certificates_of_a_bfloat16_model_are_computed_in_float32():
    """In bfloat16 the small changes of energies would drown in rounding."""
    trained = pretrained(mask="strict", norm="layer_norm", inference_rate="gamma", dtype="bfloat16")
    found = examine(trained, TOKENS, num_steps=7)
    assert found.certificate.uphill == found.certificate.rises == 0.0
    assert found.certificate.largest_step_scale >= 1.0
    assert found.certificate.contradicted == 0
    assert "bfloat16" in report(found)


def test_symbols_without_a_text_of_their_own_have_names():
    names = symbols_of(ByteTokenizer())
    assert names[ord("a")] == "a"
    assert names[0xC3] == "<c3>"
    assert len(set(names)) == 256


def test_numbers_are_json(descending):
    _, found = descending
    numbers = json.loads(json.dumps(as_numbers(found), allow_nan=False))
    assert np.shape(numbers["energies"]["total"]) == (8, 8)
    assert np.shape(numbers["speed"]) == (7, 8)
    assert np.shape(numbers["gradient_norm"]) == (8, 8)
    assert np.shape(numbers["landscape"]["path"]) == (8, 8, 2)
    assert numbers["top_tokens"][3][0][0] in "abcdefghijk"
    assert numbers["certificate"]["proposition"] == "2.1"
    rows = [i for i, step in enumerate(numbers["settled_at_step"]) if step is None]
    np.testing.assert_array_equal(rows, np.flatnonzero(found.settled == 7))


@pytest.mark.ci
@pytest.mark.parametrize("name", FIGURES)
def test_figures_name_their_axes(name, descending, tmp_path):
    _, found = descending
    drawn = FIGURES[name](found)
    bars = [axis for axis in drawn.axes if axis.get_label() == "<colorbar>"]
    plots = [axis for axis in drawn.axes if axis not in bars]
    assert all(axis.get_xlabel() or axis.get_ylabel() for axis in drawn.axes)
    assert sum(bool(axis.get_xlabel()) for axis in plots) >= len(plots) / 2
    assert plots[0].get_ylabel()
    drawn.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("model", "tokens", "options", "message"),
    [
        ({"name": "GPT"}, TOKENS, {}, "no energy"),
        ({}, TOKENS[:1], {}, "tokens=1 is not possible"),
        ({}, np.zeros(13, int), {}, "the context length 12"),
        ({"vocab_size": 16}, np.full(3, 12), {}, "token 12 is not in"),
        ({}, TOKENS, {"num_steps": 0}, "num_steps=0"),
    ],
)
def test_mistakes_are_named(model, tokens, options, message):
    with pytest.raises(UserError, match=message):
        examine(pretrained(**model), tokens, **options)


# Landscapes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    trained = pretrained(mask="strict", norm="rms_norm", inference_rate="gamma")
    dynamics, states = dynamics_and_states(trained)
    view = landscape(dynamics, states, states[2], points=5)
    return dynamics, states, jax.tree.map(np.asarray, view)


def dynamics_and_states(trained):
    """Of the text of these tests."""
    path = jax.jit(lambda v: trained.model.apply(v, TOKENS[None], method="trajectory"))
    states = path(trained.variables).states[:, 0]
    return first_dynamics(trained.model.bind(trained.variables), states[:1]), states


def test_landscape_is_the_energy_on_the_plane(seen):
    dynamics, states, view = seen
    state = start(dynamics)._replace(x=states[2][None])

    @jax.jit
    def energies(x):
        keys, _ = update_cache(dynamics, state, dynamics.norm.function(state.x))
        return energy_and_grad(dynamics, x, dynamics.norm.function(x), keys).total[0]

    for token, i, j in ((0, 0, 0), (3, 1, 4), (7, 2, 2)):
        u, v = view.axes[token, 0, j], view.axes[token, 1, i]
        point = view.centre[token] + u * view.directions[token, 0] + v * view.directions[token, 1]
        energy = energies(state.x.at[0, token].set(point))[token]
        np.testing.assert_allclose(view.energy[token, i, j], energy, rtol=1e-4)


def test_landscape_holds_the_path_in_its_leading_plane(seen):
    _, states, view = seen
    states = np.asarray(states)
    products = np.einsum("nkd,nld->nkl", view.directions, view.directions)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), products.shape), atol=1e-5)
    unit = states * np.sqrt(8) / np.linalg.norm(states, axis=-1, keepdims=True)
    flat = np.asarray(unit[:, 4] - unit[:, 4].mean(axis=0))
    values = np.linalg.svd(flat, compute_uv=False) ** 2
    np.testing.assert_allclose(view.explained[4], values[:2].sum() / values.sum(), rtol=1e-4)
    np.testing.assert_allclose(view.path[4], flat @ view.directions[4].T, atol=1e-4)
    low, high = view.axes[:, :, 0], view.axes[:, :, -1]
    assert (view.path >= low[:, None]).all()
    assert (view.path <= high[:, None]).all()


def test_landscape_keeps_lengths_that_energies_see():
    trained = pretrained(mask="strict", norm="none", inference_rate="scalar")
    dynamics, states = dynamics_and_states(trained)
    view = landscape(dynamics, states, states[-1], points=3)
    np.testing.assert_allclose(view.centre, states.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_a_small_share_is_not_written_as_none():
    assert percent(0.0) == "0.0%"
    assert percent(2e-4) == percent(1e-9) == "<0.1%"
    assert percent(5.1e-4) == "0.1%"
    assert percent(2e-4, 2) == "0.02%"
    assert spread([0.0, 3e-4], ".1%") == "<0.1% ± <0.1%"
    assert spread([0.25, 0.75], ".0%") == "50% ± 35%"
    assert spread([1.5, float("nan")], ".2f") == "1.50 (1 of 2)"
