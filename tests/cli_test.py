"""The programs as a person types them: one line and a non-zero exit code for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--config.train_steps=4",
    "--config.eval_every=2",
    "--config.model.embed_dim=8",
    "--config.model.num_steps=2",
    "--config.data.batch_size=4",
    "--config.data.listops.num_train=200",
    "--config.data.listops.num_test=5",
)


def program(name, *arguments):
    command = [sys.executable, "-m", f"nrgpt_jax.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=experiments/nope.py"], "has listops, rates, shakespeare, text"),
        (["--config=experiments/listops.py:nope"], "no variant 'nope' of listops; it has 'paper'"),
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


def test_train_evaluate_sample(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    trained = program("train", "--config=experiments/listops.py", workdir, *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert "val/accuracy" in trained.stderr
    assert any((tmp_path / "run/cache").iterdir()), "compiled programs are kept"
    evaluated = program("evaluate", workdir)
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads((tmp_path / "run/evaluation.json").read_text())
    for name in ("accuracy/listops", "accuracy/listops_add", "accuracy_sampled/listops_max"):
        assert 0.0 <= record[name] <= 1.0
        assert name in evaluated.stdout
    prompt = "max_10,(,1,7,),="
    sampled = program("sample", workdir, f"--prompt={prompt}", "--max_new_tokens=5")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith(prompt)
    exported = tmp_path / "exported"
    done = program("export", workdir, f"--out={exported}")
    assert done.returncode == 0, done.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{prompt}\nadd_10,(,3,4,),=\n")
    options = ["--format=jsonl", "--max_new_tokens=4", "--until_converged", "--max_steps=3"]
    options += ["--cache=fixed_point", "--num_samples=2"]
    listed = program(
        "sample", f"--workdir={exported}", f"--prompts_file={prompts}", "--tolerance=0", *options
    )
    assert listed.returncode == 0, listed.stderr
    records = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [r["prompt"] for r in records] == [prompt] * 2 + ["add_10,(,3,4,),="] * 2
    for record in records:
        count = len(record["tokens"])
        assert record["text"] == ",".join([record["prompt"], *record["tokens"]])
        assert [len(record[k]) for k in ("log_probs", "steps", "energies")] == [count] * 3
        assert set(record["steps"]) <= {3}
    assert "cache: fixed_point" in listed.stderr
    assert "against the exact cache: logits differ by at most" in listed.stderr
    analyzed = program("analyze", workdir, "--num_steps=3")
    assert analyzed.returncode == 0, analyzed.stderr
    assert "NOT guaranteed" in analyzed.stdout
    written = tmp_path / "run/analysis"
    assert json.loads((written / "analysis.json").read_text())["num_steps"] == 3
    names = {"analysis.html", "energies.png", "convergence.png", "predictions.png"}
    assert names | {"landscapes.png", "analysis.json"} == {p.name for p in written.iterdir()}
    refused = program("analyze", workdir, "--prompt=(")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: tokens=1 is not possible")
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    unknown = program("sample", workdir, "--prompt=max_10,(,x")
    assert unknown.returncode == 2
    assert "not in the vocabulary: 'x'" in unknown.stderr
    empty = program("sample", workdir, "--prompt=")
    assert "prompt is empty" in empty.stderr


def test_prepare_prints_what_there_is():
    done = program("prepare", "--config=experiments/listops.py", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "5 prompts listops_median" in done.stdout
    assert "20 symbols (symbol tokenizer)" in done.stdout
