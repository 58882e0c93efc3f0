"""Every model equals the paper's release: logits, loss, gradients, states and energies.

The vectors were made by running the release in float64 on float32 weights.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from marks import slow_but

from nrgpt_jax.errors import UserError
from nrgpt_jax.runs import release as interop
from nrgpt_jax.training import losses

VECTORS = sorted((Path(__file__).parent / "release_vectors").glob("*.npz"))
WITH_STATES = [path for path in VECTORS if "states" in np.load(path).files]  # a baseline has none


def load(path):
    data = np.load(path)
    part = lambda prefix: {k[len(prefix) :]: data[k] for k in data.files if k.startswith(prefix)}
    return data, json.loads(str(data["meta"])), part("param/"), part("grad/")


def case(path):
    data, meta, params, grads = load(path)
    model, variables = interop.from_release(params, meta)
    return data, meta, params, grads, model, variables


def of_release(vectors, quick=None):
    """All vectors; slow but for those of some names, where these are given."""
    chosen = [path for path in vectors if quick is None or path.stem.endswith(quick)]
    return pytest.mark.parametrize("path", slow_but(chosen, vectors), ids=lambda path: path.stem)


def test_there_are_vectors_of_all_six_models():
    names = {load(path)[1]["model"] for path in VECTORS}
    assert len(names) == 6
    with_states = {load(path)[1]["model"] for path in WITH_STATES}
    assert with_states == {name for name in names if name.startswith("NRGPT")}


@of_release(VECTORS)
def test_logits_loss_and_gradients(path):
    data, meta, params, grads, model, variables = case(path)

    def loss_fn(params):
        logits = model.apply({"params": params}, data["tokens"])
        return jnp.mean(losses.cross_entropy(logits, data["targets"])), logits

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, logits), found = value_and_grad(variables["params"])
    np.testing.assert_allclose(logits, data["logits"], atol=2e-5, rtol=0)
    assert abs(float(loss) - float(data["loss"])) < 1e-6
    # The gradients have the release's names, so reading them like parameters aligns them with
    # ours; the fixed gain of the norm has none.
    gain = {k: v for k, v in params.items() if k not in grads}
    _, expected = interop.from_release({**gain, **grads}, meta)
    for name, theirs in traverse_util.flatten_dict(expected["params"]).items():
        ours = found
        for key in name:
            ours = ours[key]
        scale = np.max(np.abs(theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale, rtol=0, err_msg=str(name))


@of_release(WITH_STATES, quick=("FF1", "FF2W_strict"))
def test_states_and_energies(path):
    data, _, _, _, model, variables = case(path)
    call = lambda method: jax.jit(lambda v: model.apply(v, data["tokens"], method=method))(
        variables
    )
    energies = call("energies")
    for ours, theirs in (("attention", "attention_energy"), ("feedforward", "feedforward_energy")):
        np.testing.assert_allclose(energies[ours][:-1], data[theirs], atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        energies["total"], energies["attention"] + energies["feedforward"], rtol=1e-6
    )
    states = call("trajectory").states
    np.testing.assert_allclose(states[:-1], data["states"], atol=1e-4, rtol=0)


def test_buffers_are_ignored_and_mistakes_are_named():
    _, meta, params, _ = load(VECTORS[-1])
    interop.from_release({**params, "blocks.attn.heads.0.tril": np.ones((12, 12))}, meta)
    with pytest.raises(UserError, match=r"model lacks: extra\.weight"):
        interop.from_release({**params, "extra.weight": np.ones(2)}, meta)
    missing = {k: v for k, v in params.items() if k != "blocks.scale_ff"}
    with pytest.raises(UserError, match=r"no parameter blocks\.scale_ff"):
        interop.from_release(missing, meta)
    wider = {**params, "token_embedding_table.weight": np.ones((18, 16), np.float32)}
    with pytest.raises(UserError, match=r"head/kernel has shape \(16, 17\), not \(16, 18\)"):
        interop.from_release(wider, {**meta, "vocab_size": 18})
