"""GPT-2's byte pairs: what a document says, text by text, is kept; a run finds them again."""

import json

import numpy as np
import pytest
import tiktoken
from decoding_helpers import small_model
from tokens_helpers import needs_gpt2, tiny_gpt2

from nrgpt_jax.analysis.examination import examine, symbols_of
from nrgpt_jax.analysis.figures import show
from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets import load_dataset, parts, tokenizers
from nrgpt_jax.datasets.tokenizers import Gpt2Tokenizer, load_tokenizer, save_tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import Continuation
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained, save_pretrained
from nrgpt_jax.sample import _printer, sample


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(tokenizers, "_gpt2", tiny_gpt2)
    monkeypatch.setattr(Gpt2Tokenizer, "size", 261)
    monkeypatch.setattr(Gpt2Tokenizer, "end", 260)
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


def test_one_text_ends_once_however_many_parts_it_has(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 50)
    text = "the end of the line\n" * 40
    (tmp_path / "book.txt").write_text(text)
    data = default_config().data
    data.update({"name": "text", "tokenizer": "gpt2", "path": str(tmp_path / "book.txt")})
    dataset = load_dataset(data)
    found = [*dataset.train.tokens, *dataset.validation.tokens]
    assert found == [*tiny.encode(text), tiny.end]


def test_a_symbol_is_shown_whole():
    assert show(" the\n\n") == "\u2423the\u21b5\u21b5"
    assert show("\x07") == "\\u0007"
    assert show("") == "\u2205"


def test_a_fixed_vocabulary_is_only_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    for tokenizer in (Gpt2Tokenizer(), tokenizers.ByteTokenizer()):
        save_tokenizer(tokenizer, path)
        written = json.loads(path.read_text())
        assert written["kind"] == tokenizer.kind
        assert "vocabulary" not in written
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


@pytest.fixture
def run(tiny, tmp_path, standard_promotion):
    """A tiny model with random parameters, as a run with this tokenizer."""
    config = default_config()
    sizes = {"vocab_size": 320, "context_length": 32, "embed_dim": 8, "num_steps": 2}
    config.model.update(sizes)
    model, variables = small_model(**config.model.to_dict())
    save_pretrained(tmp_path / "run", Pretrained(model, variables, tiny, config))
    return tmp_path / "run"


def test_samples_end_with_the_document_and_have_no_padding(run, tiny, monkeypatch):
    seen = {}

    def generate(model, variables, starts, count, settings, **more):
        seen.update(more)
        return [Continuation(np.array([257, 260]), np.zeros(2), np.zeros(2)) for _ in starts]

    monkeypatch.setattr("nrgpt_jax.generation.generate.generate", generate)
    assert sample(run, "é") == ["éthe<|endoftext|>"]
    assert (seen["num_symbols"], seen["end_token"]) == (tiny.size, tiny.end)


def test_a_stream_waits_for_whole_characters(run, capsys):
    see = _printer(load_pretrained(run), [257])
    for tokens in ([0xC3], [0xC3, 0xA9], [0xC3, 0xA9, 0xE6, 0xBC]):
        see([Continuation(np.array(tokens), np.zeros(1), np.zeros(1))], False)
    assert capsys.readouterr().out == "theé"


@pytest.mark.slow
def test_a_text_is_analyzed_by_its_tokens(run):
    found = examine(load_pretrained(run), Gpt2Tokenizer().encode("the the é"), num_steps=3)
    assert found.symbols == ["the", " ", "the", " ", "<c3>", "<a9>"]
    assert found.predictions.tokens.max() < Gpt2Tokenizer.size
