"""Checkpoints of the release become runs that evaluate and sample accept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrgpt_jax import convert, evaluate, sample
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs import directory as runs

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
pytestmark = pytest.mark.usefixtures("standard_promotion")

VECTORS = Path(__file__).parent / "release_vectors"


def checkpoint(name, path, corpus_size=20, described=True):
    """A file as the release saves it, made from reference parameters with another vocabulary."""
    data = np.load(VECTORS / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    params = {k[6:]: torch.tensor(data[k]) for k in data.files if k.startswith("param/")}
    for key in ("token_embedding_table.weight", "lm_head.weight", "lm_head.bias"):
        repeated = torch.cat([params[key], params[key]])
        params[key] = repeated[:corpus_size]
    diagonal = -1 if meta["strictly_causal"] else 0
    if name.startswith("NRGPT"):
        params["blocks.attn.heads.0.tril"] = torch.tril(torch.ones(12, 12), diagonal)
    if described:
        config = {"model_path": f"models.{meta['model']}", "dataset": "x"}
        args = {"n_layer": meta["n_layer"]}
        content = {"model": params, "model_args": args, "config": config, "iter_num": 7}
        torch.save(content, path)
    else:
        torch.save(params, path)
    return meta


@pytest.fixture(autouse=True)
def _few_expressions(monkeypatch):
    """Instead of the default data set."""
    settings = runs.default_config()
    settings.data.listops.update({"num_train": 200, "num_test": 5})
    monkeypatch.setattr(
        convert.interop, "default_config", lambda: settings.copy_and_resolve_references()
    )


@pytest.mark.parametrize(
    "name",
    [
        "NRGPT_H_FF2W_strict",
        "GPT",
        "GPT_Rec_parallel",
        pytest.param("NRGPT_H_FF1", marks=pytest.mark.slow),
    ],
)
def test_converted_runs_can_be_evaluated_and_sampled(name, tmp_path):
    meta = checkpoint(name, tmp_path / "ckpt.pt")
    workdir = tmp_path / "run"
    convert.convert(tmp_path / "ckpt.pt", workdir, data="listops")
    config = runs.load_config(workdir)
    assert config.model.name == meta["model"]
    assert config.model.num_steps == meta["n_layer"]
    assert config.model.mask == ("strict" if meta["strictly_causal"] else "inclusive")
    found = evaluate.evaluate(workdir)
    assert found["step"] == 7
    assert 0.0 < found["val/loss"] < 20.0
    (text,) = sample.sample(workdir, "max_10,(,1", max_new_tokens=3)
    assert text.startswith("max_10,(,1")
    with pytest.raises(UserError, match="holds a run already"):
        convert.convert(tmp_path / "ckpt.pt", workdir, data="listops")


def test_bare_state_dicts_need_to_be_described(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint("NRGPT_H_FF1", path, described=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "--model"),
        ({"model": "NRGPT_H_FF1"}, "--num_steps"),
        ({"model": "NRGPT_H_FF1", "num_steps": 3}, "--data"),
    ]
    for options, flag in cases:
        with pytest.raises(UserError, match=flag):
            convert.convert(path, tmp_path / "run", **options)
    convert.convert(path, tmp_path / "run", model="NRGPT_H_FF1", num_steps=3, data="listops")
    assert runs.load_config(tmp_path / "run").model.num_heads == 2


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="is no PyTorch checkpoint"):
        convert.convert(tmp_path / "x.pt", tmp_path / "run")
    with pytest.raises(UserError, match="there is no file"):
        convert.convert(tmp_path / "y.pt", tmp_path / "run")
    checkpoint("NRGPT_H_FF1", tmp_path / "small.pt", corpus_size=10)
    with pytest.raises(UserError, match="listops has 20 symbols, the checkpoint 10"):
        convert.convert(tmp_path / "small.pt", tmp_path / "run", data="listops")
