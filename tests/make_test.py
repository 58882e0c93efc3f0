"""What is given to make reaches the programs as it was given."""

import shlex
import shutil

import pytest
from make_helpers import calls_of_make

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def called(tmp_path):
    """`(*words, **environment) -> the arguments of the one program that make calls`."""

    def call(*words, **environment):
        calls, done = calls_of_make(f"make {shlex.join(words)}", tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        (arguments,) = calls
        return arguments

    return call


@pytest.mark.parametrize(
    "prompt",
    [
        "cost $5 now",
        "$(shell touch {pwned}) `touch {pwned}` $$ ; touch {pwned}",
        "  blanks before and behind  ",
        "\"quotes\" and 'quotes' and \\ and # and %",
        "",
        "two\nlines",
    ],
)
def test_a_prompt_is_not_expanded(called, tmp_path, prompt):
    prompt = prompt.replace("{pwned}", str(tmp_path / "pwned"))
    expected = ["nrgpt_jax.sample", "--workdir=runs/listops", f"--prompt={prompt}"]
    assert called("sample", f"PROMPT={prompt}") == expected
    assert called("sample", PROMPT=prompt) == expected
    assert not (tmp_path / "pwned").exists()


def test_values_with_blanks_are_one_value(called):
    train = called(
        "train", "EXP=shakespeare:paper", "WORKDIR=my runs/$a b", "ARGS=--x='a b' --y=$z"
    )
    config = "--config=experiments/shakespeare.py:paper"
    expected = ["nrgpt_jax.train", config, "--workdir=my runs/$a b", "--x=a b", "--y=$z"]
    assert train == expected
    exported = called("export", "WORKDIR=a b", "OUT=c  d")
    assert exported == ["nrgpt_jax.export", "--workdir=a b", "--out=c  d"]
    asked = called("harness", "TASKS=a,b", "WORKDIR=c d")
    assert asked[:4] == [
        "nrgpt_jax.harness",
        "--model=nrgpt_jax",
        "--model_args=workdir=c d",
        "--tasks=a,b",
    ]
    launched = called("launch", "TARGET=a b", "BUCKET=$c", "DRY_RUN=1")
    assert launched[3:] == ["--target=a b", "--bucket=$c", "--dry_run=1"]


def test_what_is_not_given_has_its_default(called):
    assert called("sample")[2:] == ["--prompt=ROMEO:"]
    assert called("sample", "ARGS=--prompts_file=a")[2:] == ["--prompts_file=a"]
    assert called("analyze") == ["nrgpt_jax.analyze", "--workdir=runs/listops"]
    assert called("export", "EXP=shakespeare:best")[1:] == [
        "--workdir=runs/shakespeare-best",
        "--out=exported/shakespeare-best",
    ]
    assert called("sweep", "SWEEP=quality:x")[1:] == [
        "--sweep=experiments/quality.py:x",
        "--launcher=local",
    ]


def test_quotes_that_do_not_end_are_one_line(called):
    with pytest.raises(AssertionError, match="error: ARGS cannot be split"):
        called("train", "ARGS=--x='a")


def test_the_demo_has_a_run_of_its_own(tmp_path):
    calls, done = calls_of_make("make demo WORKDIR=elsewhere EXP=shakespeare ARGS=--x", tmp_path)
    assert done.returncode == 0, done.stderr
    config = "--config=experiments/listops.py:demo"
    assert calls[0] == ["nrgpt_jax.train", config, "--workdir=runs/demo", "--x"]
    assert all("--workdir=runs/demo" in words for words in calls)


def test_make_inside_of_make_takes_nothing_from_outside(called, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", "-- ARGS=--outer PROMPT=outer")
    monkeypatch.setenv("WORKDIR", "outer")
    assert called("sample") == ["nrgpt_jax.sample", "--workdir=runs/listops", "--prompt=ROMEO:"]
