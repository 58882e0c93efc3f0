"""What the programs read and print of text, and symbols that stand for nothing."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import pretrained, small_model

from nrgpt_jax import sample
from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets import Prompts
from nrgpt_jax.datasets.tokenizers import ByteTokenizer, CharTokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import Continuation, Settings
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models import sharding
from nrgpt_jax.training import evaluation

MARK = "\ufeff"
LOST = "\ufffd"  # a symbol like others, and what decoders write for half of a character
FLAGS = {
    **{"prompt": None, "prompts_file": None, "workdir": "run", "checkpoint": "best", "seed": 0},
    **{"max_new_tokens": 4, "num_samples": 1, "format": "text", "cache": "exact", "top_k": 0},
    **{"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"num_steps": None, "until_converged": False, "tolerance": None, "criterion": None},
    **{"max_steps": None, "overflow": "slide", "stride": None},
}


@pytest.fixture
def printed(monkeypatch, capsys):
    """`(tokenizer, new tokens, flags) -> what is printed` for a model that draws these tokens."""

    def run(tokenizer, new, **flags):
        trained = pretrained(vocab_size=tokenizer.size)._replace(tokenizer=tokenizer)

        def stream(model, variables, prompts, *arguments, **options):
            for token in new:
                none = np.zeros(1, np.int32)
                one = Continuation(np.array([token]), none.astype(np.float32), none)
                yield [one] * len(prompts)

        monkeypatch.setattr(sample, "load_pretrained", lambda *arguments: trained)
        monkeypatch.setattr(sample.generation, "stream", stream)
        given: Any = SimpleNamespace(**{**FLAGS, **flags})
        sample.main(given)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("end", [f"b{LOST}", f"{LOST}{LOST}", f"{LOST}b"])
def test_streamed_text_is_the_text(printed, end):
    letters = CharTokenizer(f"ab{LOST}")
    new = letters.encode(end)
    assert printed(letters, new, prompt="a") == f"a{end}\n"
    (line,) = printed(letters, new, prompt="a", format="jsonl").splitlines()
    assert json.loads(line)["text"] == f"a{end}"


def test_half_of_a_character_waits_for_the_other_half(printed):
    assert printed(ByteTokenizer(), "é漢".encode(), prompt="a") == "aé漢\n"
    assert printed(ByteTokenizer(), "漢".encode()[:2], prompt="a") == f"a{LOST}\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\r\nthree", ["one", "two", "three"]),
        (
            "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\n",
            ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"],
        ),
        (f"{MARK}one\n\n{MARK}two\n", ["one", f"{MARK}two"]),
        ("  a  \r\n", ["  a  "]),
    ],
)
def test_prompts_of_a_file_are_its_lines(printed, tmp_path, content, expected):
    (tmp_path / "prompts.txt").write_bytes(content.encode())
    symbols = CharTokenizer("".join(expected))
    lines = printed(symbols, [0], prompts_file=str(tmp_path / "prompts.txt"), format="jsonl")
    assert [json.loads(line)["prompt"] for line in lines.strip().split("\n")] == expected


def test_a_file_without_a_prompt_is_refused(printed, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{MARK}\n\r\n")
    with pytest.raises(UserError):
        printed(CharTokenizer("a"), [0], prompts_file=str(tmp_path / "prompts.txt"))


# A padded vocabulary ----------------------------------------------------------------------------

KNOWN = 5


@pytest.fixture(scope="module")
def padded():
    """A model of 11 tokens, whose favourites stand for nothing."""
    model, variables = small_model(name="NRGPT_H_FF2W")
    variables["params"]["head"]["bias"] = jnp.where(jnp.arange(11) < KNOWN, 0.0, 50.0)
    return model, variables


def test_answers_are_drawn_from_symbols(padded):
    model, variables = padded
    prompts = Prompts([np.array([1, 2])] * 3, np.zeros(3, np.int32), end=0, num_symbols=KNOWN)
    for temperature in (0.0, 1.0):
        settings = Settings(Sampling(temperature))
        made = evaluation.continuations(model, variables["params"], prompts, settings=settings)
        assert all((new.tokens < KNOWN).all() for new in made)
        assert sum(len(new.tokens) for new in made)


def test_the_most_probable_token_is_a_symbol(padded):
    model, variables = padded
    mesh, tokens = sharding.make_mesh(), np.tile(np.arange(KNOWN, dtype=np.int32), (2, 1))
    logits = np.asarray(jax.jit(model.apply)(variables, tokens))
    best = logits[..., :KNOWN].argmax(axis=-1).astype(np.int32)
    batch = Batch(tokens, best, np.ones(best.shape, np.float32))
    hits = lambda step: evaluation.evaluate_loss(step, variables["params"], [batch], mesh)
    known = hits(evaluation.make_eval_step(model, mesh, num_symbols=KNOWN))
    assert known["val/token_accuracy"] == 1.0
    assert hits(evaluation.make_eval_step(model, mesh))["val/token_accuracy"] == 0.0
