"""GPT-2's byte pairs: what a document says, text by text, is kept; a run finds them again."""

import json

import numpy as np
import pytest
import tiktoken
from tokens_helpers import needs_gpt2, tiny_gpt2

from nrgpt_jax.analysis.examination import symbols_of
from nrgpt_jax.analysis.figures import show
from nrgpt_jax.datasets import tokenizers
from nrgpt_jax.datasets.tokenizers import Gpt2Tokenizer, load_tokenizer, save_tokenizer
from nrgpt_jax.errors import UserError


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(tokenizers, "_gpt2", tiny_gpt2)
    monkeypatch.setattr(Gpt2Tokenizer, "size", 259)
    monkeypatch.setattr(Gpt2Tokenizer, "end", 258)
    return Gpt2Tokenizer()


def test_text_is_kept_and_the_end_inside_it_is_text(tiny):
    text = "the é the <|endoftext|>\n"
    tokens = tiny.encode(text)
    assert tokens.dtype == np.int32
    assert tiny.end not in tokens
    assert tiny.decode(tokens) == text
    assert tiny.encode("the").tolist() == [257]
    assert tiny.decode([tiny.end]) == "<|endoftext|>"


def test_tokens_have_names_and_halves_of_characters_too(tiny):
    names = tiny.vocabulary
    assert len(names) == tiny.size
    assert names[257] == "the"
    assert names[0xC3] == "<c3>"
    assert names[tiny.end] == "<|endoftext|>"
    symbols = symbols_of(tiny)
    assert symbols[0xC3] == "<c3>"
    assert symbols[257] == "the"


def test_a_symbol_is_shown_whole():
    assert show(" the\n\n") == "\u2423the\u21b5\u21b5"
    assert show("\x07") == "\\u0007"
    assert show("") == "\u2205"


def test_a_fixed_vocabulary_is_only_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    for tokenizer in (Gpt2Tokenizer(), tokenizers.ByteTokenizer()):
        save_tokenizer(tokenizer, path)
        assert json.loads(path.read_text()) == {"kind": tokenizer.kind}
        assert load_tokenizer(path).kind == tokenizer.kind
    listed = {"kind": "byte", "vocabulary": [f"<{b:02x}>" for b in range(256)]}
    path.write_text(json.dumps(listed))
    assert load_tokenizer(path).size == 256


def test_a_vocabulary_that_cannot_be_fetched_is_one_line(monkeypatch):
    def fetch(name):
        raise OSError(f"no route to\nthe vocabulary of {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", fetch)
    tokenizers._gpt2.cache_clear()
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as error:
        Gpt2Tokenizer().encode("text")
    assert "no route to the vocabulary of gpt2" in str(error.value)
    assert "\n" not in str(error.value)
    assert Gpt2Tokenizer().size == 50257, "known without the table"


@needs_gpt2
def test_the_sizes_are_those_of_gpt2():
    encoding = tiktoken.get_encoding("gpt2")
    assert (Gpt2Tokenizer.size, Gpt2Tokenizer.end) == (encoding.n_vocab, encoding.eot_token)
    assert Gpt2Tokenizer().encode("Hello world").tolist() == [15496, 995]
