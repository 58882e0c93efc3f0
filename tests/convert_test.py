"""Checkpoints of the release become runs that evaluate and sample accept."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow

from nrgpt_jax import convert, evaluate, sample
from nrgpt_jax.configs import default_config
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
    settings = default_config()
    settings.data.listops.update({"num_train": 200, "num_test": 5})
    monkeypatch.setattr(
        convert.interop, "default_config", lambda: settings.copy_and_resolve_references()
    )


@pytest.mark.parametrize(
    "name",
    [
        "NRGPT_H_FF2W_strict",
        slow("GPT"),
        slow("GPT_Rec_parallel"),
        slow("NRGPT_H_FF1"),
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


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_file_is_run(tmp_path):
    path, reached = tmp_path / "ckpt.pt", tmp_path / "reached"
    for content in (Malicious(reached), {"model": {}, "config": Malicious(reached)}):
        torch.save(content, path)
        with pytest.raises(UserError, match="is no PyTorch checkpoint"):
            convert.convert(path, tmp_path / "run")
    path.write_bytes(pickle.dumps(Malicious(reached)))
    with pytest.raises(UserError, match="is no PyTorch checkpoint"):
        convert.convert(path, tmp_path / "run")
    assert not reached.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_val_loss": "low"}, "best_val_loss is 'low'"),
        ({"best_val_loss": [1.0]}, "best_val_loss is"),
        ({"best_val_loss": -1.0}, "best_val_loss is -1.0"),
        ({"best_val_loss": torch.ones(3)}, "best_val_loss is tensor"),
        ({"iter_num": -1}, "iter_num is -1"),
        ({"iter_num": 1e3}, "iter_num is 1000.0"),
        ({"iter_num": 10**12}, "iter_num is 1000000000000"),
        ({"model_args": {"n_layer": "3"}}, "n_layer is '3'"),
        ({"model_args": {"n_layer": -3}}, "n_layer is -3"),
        ({"model_args": {"n_layer": 10**9}}, "num_steps=1000000000 is not possible"),
        ({"model_args": [3]}, "model_args is a list"),
        ({"config": {"model_path": "models.NRGPT_X"}}, "model.name='NRGPT_X'"),
        ({"model": {"x": 3}}, "holds a int as parameter 'x'"),
        ({"model": {3: torch.ones(3)}}, "as parameter 3"),
        ({"model": {"x": torch.ones(2)}}, "no parameter token_embedding_table"),
        ({"model": {"token_embedding_table.weight": torch.ones(2)}}, r"has shape \(2,\)"),
    ],
)
def test_foreign_values_are_refused(changes, message, tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint("NRGPT_H_FF1", path)
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    with pytest.raises(UserError, match=message):
        convert.convert(path, tmp_path / "run", data="listops")
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint("NRGPT_H_FF1", path)
    content = torch.load(path, weights_only=True)
    content["model"]["lm_head.bias"][0] = float("nan")
    torch.save(content, path)
    with pytest.raises(UserError, match=r"parameter lm_head\.bias is not finite"):
        convert.convert(path, tmp_path / "run", data="listops")


def test_credentials_of_a_corpus_are_not_recorded(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint("NRGPT_H_FF1", path)
    with pytest.raises(UserError, match=r"data\.path=https://me:\*\*\*@host/x holds credentials"):
        convert.convert(path, tmp_path / "run", data="text", path="https://me:hidden@host/x")


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="is no PyTorch checkpoint"):
        convert.convert(tmp_path / "x.pt", tmp_path / "run")
    with pytest.raises(UserError, match="there is no file"):
        convert.convert(tmp_path / "y.pt", tmp_path / "run")
    checkpoint("NRGPT_H_FF1", tmp_path / "small.pt", corpus_size=10)
    with pytest.raises(UserError, match="listops has 20 symbols, the checkpoint 10"):
        convert.convert(tmp_path / "small.pt", tmp_path / "run", data="listops")
