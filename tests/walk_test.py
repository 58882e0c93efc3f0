"""The functions that a reader is sent to are those that run, and few lie between."""

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import small_model

from nrgpt_jax.configs import default_config
from nrgpt_jax.core import energies, norms
from nrgpt_jax.generation.generate import generate
from nrgpt_jax.training.losses import cross_entropy

pytestmark = pytest.mark.ci

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 12)).astype(np.int32)


def loss_and_text():
    """Of the default model with drawn parameters."""
    jax.clear_caches()
    fields = default_config().model
    model, variables = small_model(name=fields.name, attention=fields.attention, norm=fields.norm)
    logits = jax.jit(model.apply)(variables, TOKENS[:, :-1])
    loss = float(jnp.mean(cross_entropy(logits, jnp.asarray(TOKENS[:, 1:]))))
    made = generate(model, variables, list(TOKENS[:, :4]), 8)
    return loss, [text.log_probs for text in made]


@pytest.fixture(scope="module")
def plain():
    return loss_and_text()


@pytest.mark.parametrize(
    ("module", "name"),
    [(energies, "ff2w"), (energies, "full_rank"), (norms, "layer_norm")],
)
def test_what_a_definition_returns_changes_the_loss_and_the_text(module, name, plain, monkeypatch):
    """By default: docs/model.md names these lines."""
    function = inspect.unwrap(getattr(module, name))  # annotations are checked around it
    original = types.FunctionType(function.__code__, function.__globals__)
    scaled = lambda *arguments: 1.5 * original(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_scaled", scaled, raising=False)
        patch.setattr(function, "__code__", (lambda *arguments: _scaled(*arguments)).__code__)  # type: ignore[name-defined]
        loss, log_probs = loss_and_text()
    jax.clear_caches()  # of programs that hold the other definition
    assert abs(loss - plain[0]) > 1e-3
    for before, after in zip(plain[1], log_probs, strict=True):
        assert np.abs(after - before).max() > 1e-3


def test_few_functions_lie_between_a_batch_and_its_loss():
    """In a process of its own, where annotations are not checked."""
    command = [sys.executable, str(Path(__file__).with_name("walk_helpers.py"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    found = json.loads(output)
    for road, files, frames in (("batch to loss", 14, 14), ("prompt to token", 16, 15)):
        functions, stack = found[road]["functions"], found[road]["stack"]
        assert len(stack) <= frames, stack
        assert len({file for file, _ in functions}) <= files, functions
        assert ["core/energies.py", "ff2w"] in functions
        assert ["core/block.py", "block"] in functions
