"""The OpenWebText checkpoints that the authors publish: converted without the corpus, then used.

They are made in the form in which the release saves them, from reference parameters of the release
whose logits are known. The vocabulary is a tiny one of GPT-2's kind, padded as there.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from marks import slow
from tokens_helpers import tiny_gpt2

from nrgpt_jax import convert, evaluate, load_pretrained, sample
from nrgpt_jax.analysis.report import analyze
from nrgpt_jax.datasets import Dataset, tokenizers
from nrgpt_jax.datasets.tokenizers import Gpt2Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import Settings
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.runs.directory import load_config

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZE, PADDED = 259, 300
OF_SYMBOLS = ("token_embedding_table.weight", "lm_head.weight", "lm_head.bias")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(tokenizers, "_gpt2", tiny_gpt2)
    monkeypatch.setattr(Gpt2Tokenizer, "size", SIZE)
    monkeypatch.setattr(Gpt2Tokenizer, "end", SIZE - 1)


def published(folder, name="NRGPT_H_FF2W", prefix="_orig_mod.module.", padded=PADDED, **changes):
    """(the file, reference data): symbols of the reference come first, padding is most probable."""
    data = np.load(Path(__file__).parent / "release_vectors" / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    params = {k[6:]: torch.tensor(data[k]) for k in data.files if k.startswith("param/")}
    for key in OF_SYMBOLS:
        times = -(-padded // len(params[key]))
        params[key] = torch.cat([params[key]] * times)[:padded].clone()
    params["lm_head.bias"][SIZE:] = 50.0
    n = meta["block_size"]
    buffers = {"pos_idx": torch.arange(n)}
    if name.startswith("NRGPT"):
        buffers["blocks.attn.heads.0.tril"] = torch.tril(torch.ones(n, n))
    arguments = {k: meta[k] for k in ("n_embed", "n_head", "n_layer", "block_size")}
    arguments |= {"vocab_size": padded, "ff_hid_factor": 4, "dropout": 0.0, "tril_plus_one": False}
    content = {
        "model": {prefix + k: v for k, v in {**buffers, **params}.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "model_args": arguments,
        "iter_num": 100,
        "best_val_loss": torch.tensor(3.25),
        "config": {
            "dataset": "openwebtext",
            "model_path": f"models.{meta['model']}",
            "min_lr": None,
            "model_config": arguments,
        },
    }
    path = folder / f"Best_{name}.pt"
    torch.save(content | changes, path)
    return path, data


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("NRGPT_H_FF2W", "_orig_mod.module."),
        ("GPT_Rec_parallel", "module."),
        slow("NRGPT_H_FF1", "module._orig_mod."),
        slow("NRGPT_H_FF2", "_orig_mod."),
        slow("GPT", ""),
    ],
)
def test_logits_are_those_of_the_release(tmp_path, name, prefix):
    path, data = published(tmp_path, name, prefix)
    convert.convert(path, tmp_path / "run")
    trained = load_pretrained(tmp_path / "run")
    logits = jax.jit(trained.model.apply)(trained.variables, data["tokens"])
    known = data["logits"].shape[-1]
    np.testing.assert_allclose(logits[..., :known], data["logits"], atol=2e-5, rtol=0)
    assert logits.shape[-1] == PADDED
    chosen = trained.config.data
    assert (chosen.name, chosen.tokenizer, chosen.fingerprint) == ("openwebtext", "gpt2", "")
    assert json.loads((tmp_path / "run/tokenizer.json").read_text())["kind"] == "gpt2"


def test_it_makes_text_and_energies_but_has_nothing_to_be_evaluated_on(tmp_path, monkeypatch):
    path, _ = published(tmp_path)
    run = tmp_path / "run"
    convert.convert(path, run)
    for temperature in (0.0, 1.0):
        settings = Settings(Sampling(temperature=temperature))
        (text,) = sample.sample(run, "the", settings, max_new_tokens=8)
        assert text.startswith("the"), "and no token of the padding, which has no text"
    found = analyze(run, "the end", num_steps=3, out=tmp_path / "analysis")
    assert np.all(np.isfinite(found.path.energies["total"]))
    assert found.predictions.tokens.max() < SIZE
    monkeypatch.setattr("nrgpt_jax.datasets.load_dataset", lambda data: pytest.fail("a download"))
    with pytest.raises(UserError, match="converted without its corpus"):
        evaluate.evaluate(run)
    with pytest.raises(UserError, match=r"without its corpus.*or give a text of yours"):
        analyze(run)


def test_with_its_corpus_it_keeps_its_fingerprint(tmp_path, monkeypatch):
    """One document in two thousand is for validation: as many as in the release, but others."""
    asked = {}

    def load(data):
        asked.update(data.to_dict())
        return Dataset(None, None, Gpt2Tokenizer(), {}, "of the corpus")  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "load_dataset", load)
    path, _ = published(tmp_path)
    convert.convert(path, tmp_path / "run", path="gs://b/owt")
    assert (asked["name"], asked["tokenizer"], asked["path"]) == (
        "openwebtext",
        "gpt2",
        "gs://b/owt",
    )
    assert asked["validation_fraction"] == 0.0005
    assert load_config(tmp_path / "run").data.fingerprint == "of the corpus"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padded": SIZE - 1}, f"openwebtext has {SIZE} symbols, the checkpoint {SIZE - 1}"),
        ({"padded": SIZE + 128}, f"the checkpoint {SIZE + 128}: it was trained on other data"),
        ({"model": {"wte.weight": torch.zeros(3, 2)}}, "has no parameter token_embedding_table"),
        ({"model": {"wte.weight": [1.0]}}, "holds a list as parameter 'wte.weight'"),
        ({"model": 3}, "the checkpoint's model is a int"),
        ({"config": {}}, "does not say its model; give --model"),
        ({"config": {"model_path": None}}, "does not say its model; give --model"),
        ({"config": {"model_path": "models.GPT"}}, "does not say its data; give --data"),
        ({"config": {"model_path": "models.GPT", "dataset": None}}, "give --data"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    path, _ = published(tmp_path, **changes)
    with pytest.raises(UserError) as refused:
        convert.convert(path, tmp_path / "run")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [2000, -10])
def test_a_truncated_file_is_refused(tmp_path, size):
    path, _ = published(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="is cut short"):
        convert.convert(path, tmp_path / "run")
