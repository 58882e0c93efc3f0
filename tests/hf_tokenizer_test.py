"""Tokenizers of the library of Hugging Face, and of a plugin: recorded, opened without a file."""

import json
import sys

import numpy as np
import pytest
from pages_helpers import registered_here
from train_helpers import TEXT, config_of

from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.datasets.data_checks import check_data
from nrgpt_jax.datasets.tokenizers import as_record, create_tokenizer, from_record
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.training.loop import train

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


def documents(folder):
    lines = [json.dumps({"text": f"{number} {TEXT[: 60 + number]}"}) for number in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder / "corpus.jsonl"


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


def test_a_run_needs_the_file_no_more(file, tmp_path, standard_promotion):
    config = config_of(documents(tmp_path))
    config.data.tokenizer = f"hf:{file}"
    config.train_steps = 4
    tokens = load_dataset(config.data).train.read(0, 40)[0]
    text = create_tokenizer(f"hf:{file}").decode(tokens)
    assert text.replace("<|endoftext|>", "").lstrip("0123456789 ").startswith(TEXT[:20])
    train(config, tmp_path / "run")
    file.unlink()
    assert load_pretrained(tmp_path / "run", "latest").tokenizer.encode("tokens").size > 0


def test_a_tokenizer_of_a_plugin(tmp_path, monkeypatch, standard_promotion):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_tokenizer.py").write_text(OWN)
    config = config_of(documents(tmp_path))
    config.plugins, config.data.tokenizer = ("own_tokenizer",), "vowels"
    config.train_steps = 4
    with registered_here():
        train(config, tmp_path / "run")
    del sys.modules["own_tokenizer"]
    with registered_here():
        assert load_pretrained(tmp_path / "run", "latest").tokenizer.decode([0, 1]) == "-v"
    del sys.modules["own_tokenizer"]


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
