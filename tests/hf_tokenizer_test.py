"""Tokenizers of the library of Hugging Face, and of a plugin: recorded, opened without a file."""

import sys

import numpy as np
import pytest
from pages_helpers import registered_here
from preparation_helpers import write_lines
from train_helpers import TEXT, config_of

from nrgpt_jax import plugins
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.datasets.data_checks import check_data
from nrgpt_jax.datasets.tokenizers import as_record, create_tokenizer, from_record
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.directory import open_run, record_run

tokenizers = pytest.importorskip("tokenizers", reason="the library tokenizers is not installed")
OWN = """
import numpy as np
import nrgpt_jax as nrgpt


@nrgpt.tokenizer("vowels")
class Vowels:
    kind, size, end = "vowels", 2, None
    vocabulary = ["-", "v"]

    def encode(self, text):
        return np.array([character in "aeiou" for character in text], np.int32)

    def decode(self, tokens):
        return "".join(self.vocabulary[token] for token in tokens)
"""


@pytest.fixture
def file(tmp_path):
    """A tokenizer.json of byte pairs, with an end."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    options = {"vocab_size": 300, "special_tokens": ["<|endoftext|>"], "show_progress": False}
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(**options, initial_alphabet=alphabet)
    own.train_from_iterator([TEXT], trainer)
    own.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_text_survives_and_the_end_is_found(file):
    ours = create_tokenizer(f"hf:{file}")
    text = "the tokens roll, déjà vu <|endoftext|>"
    assert ours.decode(ours.encode(text)) == text
    assert ours.end == 0
    assert 0 not in ours.encode(text), "text that looks like the end is text"
    again = from_record(as_record(ours))
    assert len(again.vocabulary) == again.size == ours.size
    np.testing.assert_array_equal(again.encode(text), ours.encode(text))


def test_it_neither_truncates_nor_pads(file):
    own = tokenizers.Tokenizer.from_file(str(file))
    own.enable_truncation(3)
    own.enable_padding(length=64)
    own.save(str(file))
    ours = create_tokenizer(f"hf:{file}")
    for text in ("hi", TEXT):
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["hf", "vowels"])
def test_a_run_needs_the_file_no_more_and_imports_a_plugin(file, tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_tokenizer.py").write_text(OWN)
    write_lines(tmp_path / "corpus.jsonl", [f"{number} {TEXT[:60]}" for number in range(60)])
    config = config_of(tmp_path / "corpus.jsonl")
    config.data.tokenizer = f"hf:{file}" if kind == "hf" else kind
    config.plugins = () if kind == "hf" else ("own_tokenizer",)
    with registered_here():
        plugins.load(config.plugins)
        dataset = load_dataset(config.data)
        tokens = dataset.train.read(0, 40)[0]
        expected = dataset.tokenizer.decode(tokens)
        config.model.vocab_size = dataset.tokenizer.size
        record_run(tmp_path / "run", config, dataset.tokenizer)
    assert kind == "vowels" or TEXT[:20] in expected
    sys.modules.pop("own_tokenizer", None)
    file.unlink()
    with registered_here():
        assert open_run(tmp_path / "run")[1].decode(tokens) == expected
    sys.modules.pop("own_tokenizer", None)


def test_mistakes_are_one_line(file, tmp_path):
    config = config_of(tmp_path / "text.txt")
    config.data.tokenizer = "words"
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        check_data(config.data.to_dict())
    file.write_text("{}")
    with pytest.raises(UserError) as error:
        create_tokenizer(f"hf:{file}")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no tokenizer"):
        from_record({"kind": "words"})
