"""What the README shows works: its energy example, its commands, the files it names."""

import functools
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from decoding_helpers import small_model

from nrgpt_jax import create_model
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.datasets.tokenizers import CharTokenizer
from nrgpt_jax.runs.pretrained import Pretrained, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_energy_example_trains():
    """Run as it stands; the model that it names then goes down its loss."""
    (example,) = re.findall(r"```python\n([^`]*@feedforward[^`]*)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    (name,) = re.findall(r'@feedforward\("(\w+)"', example)
    try:
        assert f"NRGPT_H_{name}" in README
        config = default_config().model
        config.update({"name": f"NRGPT_H_{name}", "vocab_size": 5, "embed_dim": 16})
        model = create_model(config)
        tokens = jnp.arange(40).reshape(1, 40) % 5
        params = model.init(jax.random.key(0), tokens)

        @jax.jit
        def loss_and_grads(params):
            def loss_fn(params):
                log_p = jax.nn.log_softmax(model.apply(params, tokens[:, :-1]))
                return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1))

            return jax.value_and_grad(loss_fn)(params)

        first, grads = loss_and_grads(params)
        of_energy = grads["params"]["block"]["feedforward"]
        assert all(float(jnp.abs(grad).max()) > 0.0 for grad in of_energy.values())
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        assert float(loss_and_grads(params)[0]) < float(first), "a small step downhill"
        energies = model.apply(params, tokens, method="energies")
        assert bool(jnp.all(jnp.isfinite(energies["feedforward"])))
    finally:
        ENERGIES.remove(name)


def test_the_python_example_runs():
    (example,) = re.findall(
        r"```python\n(import jax\nfrom nrgpt_jax import.*?)```", README, re.DOTALL
    )
    found: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), found)
    assert found["logits"].shape == (1, 12, 65)
    assert {e.shape for e in found["energies"].values()} == {(7, 1, 12)}


def test_the_text_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n([^`]*load_pretrained[^`]*)```", README)
    config = default_config()
    config.model.update({"vocab_size": 60, "context_length": 32, "embed_dim": 8, "num_steps": 2})
    model, variables = small_model(**config.model.to_dict())
    characters = CharTokenizer(map(chr, range(ord("A"), ord("A") + 57)))
    tokenizer = CharTokenizer([*characters.vocabulary, " ", ",", ":"])
    folder = tmp_path / "runs/shakespeare"
    save_pretrained(folder, Pretrained(model, variables, tokenizer, config))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), found)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert all(score.log_likelihood < 0 for score in found["scores"])


def commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("make ")]


@pytest.mark.parametrize("command", commands())
def test_make_commands_exist(command):
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace("make ", "make -n ", 1)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for path, variant in re.findall(r"--config=(experiments/\w+\.py):?(\w*)", done.stdout):
        get_config = runpy.run_path(str(ROOT / path))["get_config"]
        fields = get_config(*[variant] * bool(variant)).to_dict()
        for field in re.findall(r"--config\.([\w.]+)=", done.stdout):
            assert functools.reduce(lambda part, name: part[name], field.split("."), fields) != {}


def test_files_it_names_exist():
    names = set(re.findall(r"`([\w/]+/[\w.]*\.(?:py|md|svg|npz))`", README))
    names |= set(re.findall(r"\]\(((?!http)[\w/.]+)\)", README))
    assert len(names) > 10
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing
