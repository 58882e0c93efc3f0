"""lm-evaluation-harness sees our likelihoods, without a network."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from decoding_helpers import small_model

from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets.tokenizers import ByteTokenizer, SymbolTokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import log_likelihood
from nrgpt_jax.runs.pretrained import Pretrained, save_pretrained

pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")

from nrgpt_jax import harness
from nrgpt_jax.harness import NAME, HarnessModel

pytestmark = pytest.mark.ci

LENGTH = 48
QUESTIONS: list[dict[str, Any]] = [
    {"question": "Which rolls?", "choices": ["a cube", "a ball", "a cone", "none"], "answer": 1},
    {"question": "What falls?", "choices": ["up", "it", "energy", "a stone"], "answer": 2},
    {"question": "Who?", "choices": ["I", "you", "they", "we all"], "answer": 3},
]
TASK = {
    "task": "rolling",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small exported model of bytes."""
    folder, config = tmp_path_factory.mktemp("model"), default_config()
    fields = {"vocab_size": 256, "context_length": LENGTH, "embed_dim": 8, "num_steps": 2}
    config.model.update(fields)
    model, variables = small_model(**config.model.to_dict())
    save_pretrained(folder, Pretrained(model, variables, ByteTokenizer(), config))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return HarnessModel(str(folder), batch_size=4)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Data sets of files, and a folder of their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_task(folder, task, questions=QUESTIONS, **fields):
    """A task over some questions."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "task.yaml").write_text(json.dumps({**task, **fields, **files}))  # JSON is YAML


def accuracy(model, folder, task):
    """As the harness finds it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return found["results"][task]["acc,none"]


def best(model, question, endings):
    """The most likely ending, by our own likelihoods."""
    contexts = [model.text.encode(question)] * len(endings)
    ends = [model.text.encode(" " + ending) for ending in endings]
    scores = log_likelihood(model.model, model.variables, contexts, ends)
    return int(np.argmax([score.log_likelihood for score in scores]))


@pytest.mark.filterwarnings("ignore")  # of the harness and what it stands on
def test_multiple_choice_is_that_of_our_likelihoods(model, tmp_path, offline):
    write_task(tmp_path, TASK)
    chosen = [best(model, q["question"], q["choices"]) for q in QUESTIONS]
    hits = [answer == q["answer"] for answer, q in zip(chosen, QUESTIONS, strict=True)]
    assert accuracy(model, tmp_path, "rolling") == pytest.approx(np.mean(hits))
    right = [{**q, "answer": answer} for answer, q in zip(chosen, QUESTIONS, strict=True)]
    write_task(tmp_path, TASK, right)
    assert accuracy(model, tmp_path, "rolling") == 1.0


@pytest.mark.filterwarnings("ignore")
def test_mmlu_is_asked_by_the_letters(model, tmp_path, offline):
    import lm_eval.tasks

    template = f"{lm_eval.tasks.__path__[0]}/mmlu/default/_default_template_yaml"
    fields = {"include": template, "dataset_path": "json", "fewshot_split": "test"}
    asked = [
        "\n".join(
            [q["question"], *(f"{a}. {c}" for a, c in zip("ABCD", q["choices"], strict=True))]
        )
        for q in QUESTIONS
    ]
    own = [best(model, f"{text}\nAnswer:", "ABCD") for text in asked]
    right = [{**q, "answer": answer} for answer, q in zip(own, QUESTIONS, strict=True)]
    write_task(tmp_path, {"task": "mmlu_here"}, right, **fields)
    assert accuracy(model, tmp_path, "mmlu_here") == 1.0


def test_whole_texts_are_scored_token_by_token(model):
    request = lambda text: SimpleNamespace(args=(text,))
    short, long = "the tokens roll", "the tokens roll down the hill, and the hill rolls too. " * 2
    found = model.loglikelihood_rolling([request(short), request(""), request(long)])
    score = lambda a, b: log_likelihood(model.model, model.variables, [a], [b])[0].log_likelihood
    prefix, encode = np.array([model.eot_token_id]), model.text.encode
    assert found[0] == pytest.approx(score(prefix, encode(short)), rel=1e-5)
    assert found[1] == 0.0
    tokens = np.concatenate([prefix, encode(long)])
    whole = score(tokens[:1], tokens[1 : LENGTH + 1])
    for start in range(LENGTH + 1, len(tokens), LENGTH):
        stop = min(start + LENGTH, len(tokens))
        begin = stop - LENGTH - 1  # a full window, for which more of the text is read
        whole += score(tokens[begin:start], tokens[start:stop])
    assert found[2] == pytest.approx(whole, rel=1e-5)


def ask(model, *contexts, **options):
    return model.generate_until([SimpleNamespace(args=(text, options)) for text in contexts])


def test_texts_are_as_long_as_asked_wherever_they_begin(model):
    alone = ask(model, "the hill", max_gen_toks=5)
    contexts = "the hill", "", "a much longer beginning, longer than the context can be at all"
    found = ask(model, *contexts, max_new_tokens=5)
    assert found[0] == alone[0]
    assert all(found)


def test_a_prompt_is_read_whole(model):
    """Also where it and what may follow are longer than the context: the task asks for 256."""
    prompt = "the tokens roll down the hill"
    continued = lambda count: (
        generate(
            *(model.model, model.variables, [model.text.encode(prompt)], count), num_symbols=256
        )[0].tokens
    )
    assert len(prompt) + 30 > LENGTH
    assert ask(model, prompt, max_gen_toks=30) == [model.text.decode(continued(30))]
    assert ask(model, prompt)[0][:3] == model.text.decode(continued(30))[:3]
    other = ask(model, "another beginning with the same end" + prompt[-1], max_gen_toks=8)
    assert other != ask(model, prompt, max_gen_toks=8), "not its last token alone"


def test_longer_texts_than_can_be_read_are_reported(model, capsys):
    ask(model, "x" * LENGTH, "y" * (LENGTH + 1), max_gen_toks=2)
    assert "1 of 2 texts" in capsys.readouterr().err
    model._loglikelihood_tokens([(("", ""), [1] * LENGTH, [2]), (("", ""), [1] * LENGTH, [2, 3])])
    assert "1 of 2 texts" in capsys.readouterr().err


def test_a_stop_counts_in_the_continuation_alone_also_across_pieces(model, monkeypatch):
    prompt = "the hill"
    text = ask(model, prompt, max_gen_toks=24)[0]
    assert ask(model, prompt, max_gen_toks=24, until=[prompt[-1] + text[0]]) == [text]
    middle = text[6:9]
    expected = text[: text.index(middle)]
    for piece in (1, 2, 16):
        monkeypatch.setattr(harness, "PIECE", piece)
        for until in (middle, ["", "never", middle]):
            assert ask(model, prompt, max_gen_toks=24, until=until) == [expected]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (Sampling(0.0), [], 256)),
        ({"until": None, "max_new_tokens": "16"}, (Sampling(0.0), [], 16)),
        ({"do_sample": True}, (Sampling(1.0), [], 256)),
        ({"do_sample": False, "temperature": 1}, (Sampling(0.0), [], 256)),
        ({"temperature": 0.7, "until": "a"}, (Sampling(0.7), ["a"], 256)),
        ({"do_sample": True, "temperature": "0.5", "top_k": "3"}, (Sampling(0.5, 3), [], 256)),
        ({"num_beams": "1", "repetition_penalty": 2}, (Sampling(repetition_penalty=2.0), [], 256)),
    ],
)
def test_options_of_a_task_are_honoured(options, expected):
    assert tuple(harness.options_of_task(options)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"penalty_alpha": 0.6},
        {"temperature": "warm"},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"do_sample": "yes"},
        {"max_gen_toks": 0},
        {"max_gen_toks": 2.5},
        {"max_new_tokens": float("inf")},
        {"max_tokens": float("nan")},
        {"until": 5},
        {"until": ["a", 5]},
    ],
)
def test_options_that_are_not_possible_are_refused_before_the_model_is_asked(model, options):
    good, bad = (SimpleNamespace(args=("a", o)) for o in ({"max_gen_toks": 2}, options))
    with pytest.raises(UserError):
        model.generate_until([good, bad])


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (SymbolTokenizer(["a", "<eos>"]), 1),
        (ByteTokenizer(), ord("\n")),
        (SymbolTokenizer(["a", "b"]), 0),
    ],
)
def test_what_stands_before_a_text_without_context(model, monkeypatch, tokenizer, token):
    monkeypatch.setattr(model, "text", tokenizer)
    assert model.prefix_token_id == token


def test_mistakes_name_the_argument(folder, tmp_path):
    for options, message in (
        ({"steps": 3}, "unknown argument 'steps' of --model nrgpt_jax"),
        ({"num_steps": -1}, "num_steps"),
        ({"num_steps": "2.5"}, r"num_steps='2\.5' is not possible"),
        ({"batch_size": 0}, "batch_size=0 is not possible"),
    ):
        with pytest.raises(UserError, match=message):
            HarnessModel(str(folder), **options)
    with pytest.raises(UserError, match="is not a run directory"):
        HarnessModel(str(tmp_path))


@pytest.mark.slow
def test_the_program_is_the_harness_with_one_more_model(folder, tmp_path, offline):
    write_task(tmp_path, TASK)
    command = [sys.executable, "-m", "nrgpt_jax.harness", "--model", NAME, "--tasks", "rolling"]
    command += ["--model_args", f"workdir={folder}", "--include_path", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "rolling" in ended.stdout
    command[command.index(f"workdir={folder}")] = f"workdir={tmp_path}"
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: ")
