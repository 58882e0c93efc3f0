"""The programs as a person types them: one line and a non-zero exit code for every mistake."""

import json
import re

import pytest
from programs_helpers import program

from nrgpt_jax.errors import UserError
from nrgpt_jax.evaluate import evaluate
from nrgpt_jax.training import evaluation

SMALL = (
    "--config.train_steps=4",
    "--config.eval_every=2",
    "--config.model.embed_dim=8",
    "--config.model.num_steps=2",
    "--config.model.context_length=48",
    "--config.data.batch_size=4",
    "--config.data.listops.num_train=200",
    "--config.data.listops.num_test=5",
)
PROMPT = "max_10,(,1,7,),="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=experiments/nope.py"],
            "there are c4, frontier, listops, listops_transition, openwebtext, overfitting,",
        ),
        (
            ["--config=experiments/listops.py:nope"],
            "no variant 'nope' of listops; it has 'rest', 'long', 'demo', 'guaranteed',",
        ),
        (["--config=experiments/listops.py", "--config.model.embed=3"], "did you mean"),
        (["--config=experiments/listops.py", "--config.train_steps=1e3"], "train_steps=1e3"),
        (["--config=experiments/listops.py", "stray"], "unexpected argument 'stray'"),
        (["--config=experiments/text.py"], "data.path is empty"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
    workdir = tmp_path / "run"
    done = program("train", f"--workdir={workdir}", *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not workdir.exists(), "nothing is written"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "near"), [("config.data.pth=x", "data.path"), ("noconfig.wnadb", "wandb")]
)
def test_a_wrong_field_of_a_sweep_ends_in_one_line(tmp_path, field, near):
    where = "--sweep=experiments/overfitting.py", f"--runs={tmp_path / 'runs'}"
    done = program("sweep", *where, f"--{field}")
    assert done.returncode != 0
    assert done.stderr.startswith("error: unknown field --config.")
    assert f"; did you mean {near}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory, made by the program."""
    workdir = tmp_path_factory.mktemp("programs") / "run"
    done = program("train", "--config=experiments/listops.py", f"--workdir={workdir}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "val/accuracy" in done.stderr
    return workdir


@pytest.mark.long
def test_train_and_evaluate(run):
    how = {"num_steps": 3, "cache": "fixed_point"}
    given = [f"--{name}={value}" for name, value in how.items()]
    evaluated = program("evaluate", f"--workdir={run}", *given)
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads((run / "evaluation.json").read_text())
    assert record.items() >= how.items()
    for name in ("listops", "listops_add", "listops_max"):
        greedy, drawn = record[f"accuracy/{name}"], record[f"accuracy_sampled/{name}"]
        assert re.search(rf"^{name} +{greedy:.1%} +{drawn:.1%}$", evaluated.stdout, re.MULTILINE)
    assert re.search(rf"^val/loss +{record['val/loss']:.4f}$", evaluated.stdout, re.MULTILINE)


@pytest.mark.long
def test_an_evaluation_has_the_depth_and_the_cache_that_are_wanted(run, monkeypatch):
    """Each loss at its depth, and answers with the settings of both."""
    asked = []

    def answer(*_, settings, limit):
        asked.append((settings.num_steps, settings.cache, limit))
        return {}

    monkeypatch.setattr(evaluation, "evaluate_prompts", answer)
    usual, as_trained, deeper = (
        evaluate(run, num_steps=n, cache="fixed_point")["val/loss"] for n in (None, 2, 3)
    )
    assert usual == as_trained
    assert abs(deeper - usual) > 1e-6
    assert asked == [(n, "fixed_point", None) for n in (None, None, 2, 2, 3, 3)]
    with pytest.raises(UserError, match="num_steps=0"):
        evaluate(run, num_steps=0)


@pytest.mark.long
def test_sample(run):
    sampled = program("sample", f"--workdir={run}", f"--prompt={PROMPT}", "--max_new_tokens=5")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith(PROMPT)
    unknown = program("sample", f"--workdir={run}", "--prompt=max_10,(,x")
    assert unknown.returncode == 2
    assert "not in the vocabulary: 'x'" in unknown.stderr
    empty = program("sample", f"--workdir={run}", "--prompt=")
    assert "prompt is empty" in empty.stderr


@pytest.mark.ci
@pytest.mark.long
def test_export_and_sample_from_it(run, tmp_path):
    exported = tmp_path / "exported"
    done = program("export", f"--workdir={run}", f"--out={exported}")
    assert done.returncode == 0, done.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\nadd_10,(,3,4,),=\n")
    options = ["--format=jsonl", "--max_new_tokens=4", "--until_converged", "--max_steps=3"]
    options += ["--cache=fixed_point", "--num_samples=2"]
    listed = program(
        "sample", f"--workdir={exported}", f"--prompts_file={prompts}", "--tolerance=0", *options
    )
    assert listed.returncode == 0, listed.stderr
    records = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [r["prompt"] for r in records] == [PROMPT] * 2 + ["add_10,(,3,4,),="] * 2
    for record in records:
        count = len(record["tokens"])
        assert record["text"] == ",".join([record["prompt"], *record["tokens"]])
        assert [len(record[k]) for k in ("log_probs", "steps", "energies")] == [count] * 3
        assert set(record["steps"]) <= {3}
    assert "cache: fixed_point" in listed.stderr
    assert "the exact cache: logits differ by at most" in listed.stderr


@pytest.mark.ci
@pytest.mark.long
def test_analyze(run):
    analyzed = program("analyze", f"--workdir={run}", "--num_steps=3")
    assert analyzed.returncode == 0, analyzed.stderr
    assert "NOT guaranteed" in analyzed.stdout
    written = run / "analysis"
    assert json.loads((written / "analysis.json").read_text())["num_steps"] == 3
    names = {"analysis.html", "energies.png", "convergence.png", "predictions.png"}
    assert names | {"landscapes.png", "analysis.json"} == {p.name for p in written.iterdir()}
    refused = program("analyze", f"--workdir={run}", "--prompt=(")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: tokens=1 is not possible")
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_prepare_prints_what_there_is():
    done = program("prepare", "--config=experiments/listops.py", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "5 prompts listops_median" in done.stdout
    assert "20 symbols (symbol tokenizer)" in done.stdout
