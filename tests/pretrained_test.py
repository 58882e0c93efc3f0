"""Exported folders: bit by bit the same model, and compiled functions that need JAX alone."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import small_model
from marks import slow_but

from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets.tokenizers import SymbolTokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.export import compiled_functions, export
from nrgpt_jax.generation.generate import generate
from nrgpt_jax.runs.directory import record_run
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE, Pretrained, load_pretrained, save_pretrained

LENGTH = 12


def trained(**fields):
    config = default_config()
    config.model.update({"vocab_size": 11, "context_length": LENGTH, "embed_dim": 8})
    config.model.update({"num_heads": 2, "num_steps": 3, **fields})
    model, variables = small_model(**config.model.to_dict())
    return Pretrained(model, variables, SymbolTokenizer(map(str, range(11))), config)


@pytest.mark.parametrize("name", ["NRGPT_H_FF2W", "GPT"])
def test_saved_and_loaded_is_the_same(name, tmp_path):
    before = trained(name=name, inference_rate="gamma", norm="layer_norm", learn_beta=True)
    save_pretrained(tmp_path / "new/folder", before)
    after = load_pretrained(tmp_path / "new/folder")
    assert after.model == before.model
    assert after.tokenizer.vocabulary == before.tokenizer.vocabulary
    assert after.config.to_dict() == before.config.to_dict()
    leaves = [jax.tree.leaves_with_path(p.variables) for p in (before, after)]
    for (path, a), (other, b) in zip(*leaves, strict=True):
        assert path == other
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    save_pretrained(tmp_path, trained(name="NRGPT_H_FF2W"))
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[:1000])
    with pytest.raises(UserError, match=f"its file {WEIGHTS_FILE} does not match its checksum"):
        load_pretrained(tmp_path)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(tmp_path)
    save_pretrained(tmp_path / "other", trained(name="NRGPT_H_FF2W", embed_dim=16))
    (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / "other" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(UserError, match=r"of another model: parameter .*\(2, 16, 16\), not"):
        load_pretrained(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a run directory"):
        save_pretrained(tmp_path, trained(name="NRGPT_H_FF2W"))
    with pytest.raises(UserError, match="not a run directory"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.ci
def test_exported_functions_run_without_this_package(tmp_path):
    """By the program in the folder; what no symbol stands for is never the next token."""
    before = trained(name="NRGPT_H_FF2W", mask="strict", attention="low_rank")
    before.variables["params"]["head"]["bias"] = jnp.where(jnp.arange(11) < 8, 0.0, 100.0)
    before = before._replace(tokenizer=SymbolTokenizer(map(str, range(8))))
    export(before, tmp_path)
    program = tmp_path / "usage.py"
    assert "nrgpt" not in program.read_text()
    without = "import runpy, sys; sys.modules['nrgpt_jax'] = None; sys.argv = sys.argv[1:];"
    run = f"{without} runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", run, str(program), "1,2,3", "9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prompts = [np.array([1, 2, 3])]
    (expected,) = generate(before.model, before.variables, prompts, 9, num_symbols=8)
    assert done.stdout.strip() == ",".join(map(str, expected.tokens))


@pytest.mark.ci
@pytest.mark.parametrize("name", slow_but(["GPT_Rec"], ["NRGPT_H_FF1", "GPT_Rec"]))
def test_exported_functions_take_any_batch_and_depth(name):
    one = trained(name=name, per_step_scale=True)
    functions = compiled_functions(one, num_steps=5)
    assert functions["decode"].platforms == ("cpu", "cuda", "tpu")
    flat = {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(one.variables["params"])
    }
    deep, variables = one.model.with_num_steps(one.variables, 5)
    for batch in (1, 3):
        tokens = np.random.default_rng(batch).integers(0, 11, (batch, LENGTH)).astype(np.int32)
        lengths = np.arange(4, 4 + batch, dtype=np.int32)
        whole = jax.jit(deep.apply)(variables, tokens)
        rows = np.arange(batch)
        logits, cache = functions["prefill"].call(flat, tokens, lengths)
        np.testing.assert_allclose(logits, whole[rows, lengths - 1], atol=1e-4)
        logits, cache = functions["decode"].call(flat, tokens[rows, lengths], lengths, cache)
        np.testing.assert_allclose(logits, whole[rows, lengths], atol=1e-4)


def test_a_run_of_version_1_says_which_commit_converts_it(tmp_path):
    before = trained(name="NRGPT_H_FF2W")
    record_run(tmp_path, before.config, before.tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["record"], config["checksum"], config["model"]["rule"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"check out commit \w+ .*nrgpt_jax\.convert --run="):
        load_pretrained(tmp_path)
