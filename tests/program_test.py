"""The program `nrgpt`: commands, names of experiments and runs, options, completion."""

import subprocess
import sys

import pytest
from pages_helpers import ROOT

from nrgpt_jax import __main__ as program
from nrgpt_jax import bundled, cli
from nrgpt_jax.generation.generate import generate
from nrgpt_jax.runs.pretrained import load_pretrained


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Where modules are looked for, which names of experiments add to, is as before."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def nrgpt(*words, cwd=ROOT):
    command = [sys.executable, "-m", "nrgpt_jax", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_help_names_every_command():
    done = nrgpt("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in program.COMMANDS)
    assert len(done.stdout.splitlines()) <= 10


@pytest.mark.parametrize(
    "words", [("trian",), ("train", "nothing"), ("evaluate", "--nothing=1"), ("sample", "s3://a/b")]
)
def test_a_mistake_is_one_line(words):
    done = nrgpt(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_names_become_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir, more = program.flags_of("train", ["listops:demo", "--config.seed=1"])
    assert config == f"--config={bundled.EXPERIMENTS / 'listops.py'}:demo"
    assert (workdir, more) == ("--workdir=runs/listops-demo", "--config.seed=1")
    assert len(program.flags_of("train", ["listops", "--workdir=x"])) == 2
    assert program.flags_of("sample", ["runs/x"]) == ["--workdir=runs/x"]
    own = tmp_path / "experiments/listops.py"
    own.parent.mkdir()
    own.write_text("")
    assert program.flags_of("prepare", ["listops"]) == ["--config=experiments/listops.py"]
    (tmp_path / "mine.py").write_text("")
    assert program.flags_of("sweep", ["mine.py:big"]) == ["--sweep=mine.py:big"]


def test_completion():
    assert "train " in program.completions(["tr"])
    assert "listops" in program.completions(["train", "list"])
    assert program.completions(["train", "x", "--config.model.embed"]) == [
        "--config.model.embed_dim="
    ]
    assert program.completions(["train", "x", "y"]) == []


def test_options_and_tuples_are_readable():
    words = ["p", "--config.model.energies=injection,leak", "--config.model.options.K=3"]
    words += ["--config.optimizer.options.b1=0.9", "--config.data.options.kind=ab"]
    words += ["--config.step_metrics=('energy',)", "--config.plugins=a", "--config.seed=1"]
    words += ["--config.optimizer.options.nesterov=false", "--config.model.options.power", "2.5"]
    words += ["--model.options.K=4"]
    rest, options = cli.readable(words)
    assert rest == [
        "p",
        "--config.model.energies=('injection', 'leak')",
        "--config.step_metrics=('energy',)",
        "--config.plugins=('a',)",
        "--config.seed=1",
        "--model.options.K=4",
    ]
    assert options == {
        "optimizer.options.nesterov": False,
        "model.options.power": 2.5,
        "model.options.K": 3,
        "optimizer.options.b1": 0.9,
        "data.options.kind": "ab",
    }


def test_models_come_along(tmp_path, monkeypatch):
    """By name: small, and one of them can reckon."""
    files = [path for path in bundled.RUNS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert bundled.runs() == ["listops", "shakespeare"]
    monkeypatch.chdir(tmp_path)
    for name in bundled.runs():
        trained = load_pretrained(name)
        assert trained.model.vocab_size == trained.tokenizer.size
    trained = load_pretrained("listops")
    prompt = trained.tokenizer.encode("add_5,(,4,max_5,(,1,3,2,),4,),=")
    [new] = generate(*trained[:2], [prompt], 30, end_token=trained.tokenizer.end)
    assert trained.tokenizer.decode(new.tokens).endswith("=,1")


def test_a_name_is_a_run_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.flags_of("sample", ["listops"]) == ["--workdir=runs/pretrained/listops"]
    assert (tmp_path / "runs/pretrained/listops/model.safetensors").is_file()
    (tmp_path / "runs/listops").mkdir()
    assert program.flags_of("sample", ["listops"]) == ["--workdir=runs/listops"]
    assert program.flags_of("sample", ["nothing"]) == ["--workdir=nothing"]
