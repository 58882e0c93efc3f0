"""Texts as people have them: nothing is lost or read twice, and splits keep their share."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preparation_helpers import TEXTS, data_of, write_lines, write_parquet
from tokens_helpers import tiny_gpt2

from nrgpt_jax.datasets import load_dataset, parts, pieces, tokenizers
from nrgpt_jax.datasets.files import list_files
from nrgpt_jax.datasets.pieces import Text
from nrgpt_jax.errors import UserError

MARK = "\ufeff"
TINY = tiny_gpt2()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """GPT-2's pattern, and a table that is in no need of a network."""
    monkeypatch.setattr(tokenizers, "_gpt2", tiny_gpt2)
    monkeypatch.setattr(tokenizers.Gpt2Tokenizer, "size", TINY.n_vocab)
    monkeypatch.setattr(tokenizers.Gpt2Tokenizer, "end", TINY.eot_token)


def prepared(path, tokenizer, name="text", **fields):
    return load_dataset(data_of(path, name=name, tokenizer=tokenizer, **fields))


def text_of(dataset, end=""):
    """Both splits, one after the other."""
    both = [dataset.train.tokens, dataset.validation.tokens]
    return "".join(dataset.tokenizer.decode(tokens) for tokens in both).replace(
        "<|endoftext|>", end
    )


def one_text(folder, text):
    (folder / "a.txt").write_bytes(text.encode())
    return Text(list_files(str(folder), (".txt",)))


def share(dataset):
    return len(dataset.validation) / (len(dataset.train) + len(dataset.validation))


# One text ---------------------------------------------------------------------------------------

WORDS = ["word", "it's", "'s", "漢字", "語", "、", "。", "é", "क्षि", "12", "ACGT", "."]
BLANKS = [" ", "  ", "\n", "\r\n", "\r\n\r\n", "\t", "\u2028", "\x85", "\xa0", "\v", "\f", ""]


@st.composite
def texts(draw):
    """Lines of one way to write: words of some scripts with one or two kinds of blanks, or none."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
    blanks = draw(st.lists(st.sampled_from(BLANKS), min_size=1, max_size=2))
    order = draw(st.lists(st.integers(0, 7), min_size=20, max_size=80))
    parts = (words[i % len(words)] + blanks[i % len(blanks)] for i in order)
    return draw(st.sampled_from(("", MARK))) + "".join(parts) * draw(st.integers(1, 20))


@given(text=texts(), tokenizer=st.sampled_from(("char", "byte", "gpt2")))
@example(text="word\r\n" * 300, tokenizer="gpt2")
@example(text="漢" * 700, tokenizer="gpt2")
@example(text="漢字、語。" * 99, tokenizer="gpt2")
@example(text="ACGT" * 400 + " " + "ACGT" * 20, tokenizer="gpt2")
@example(text=" " * 500, tokenizer="gpt2")
@settings(max_examples=40, deadline=None)
def test_a_text_loses_nothing_and_keeps_its_share(text, tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(text.encode())
        dataset = prepared(path, tokenizer)
    assert text_of(dataset) == text.removeprefix(MARK)
    unit = 1 / (len(dataset.train) + len(dataset.validation))
    assert 0.085 - 9 * unit <= share(dataset) <= 0.11 + 9 * unit


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("漢字漢字、漢字", 1, (12, True)),  # before the comma
        ("I'llx8", 1, (1, True)),
        ("I'llx8", 2, (5, True)),  # not inside 'll
        ("漢漢漢", 4, (6, False)),
        ("ab\tc\r\nd", 1, (2, True)),
    ],
)
def test_where_a_text_is_cut(tmp_path, text, at, expected):
    assert one_text(tmp_path, text).place_to_cut(at, len(text.encode()) - at - 1) == expected


@pytest.mark.parametrize("blank", [" ", "\t", "\r\n", "\v", "\f"])
def test_a_blank_is_looked_for_further_than_another_kind_of_character(tmp_path, monkeypatch, blank):
    monkeypatch.setattr(pieces, "NEAR", 1)
    assert one_text(tmp_path, f"abcdefgh{blank}ij").place_to_cut(1, 9) == (8, True)


@pytest.mark.parametrize("text", ["漢字、語。" * 99, "ACGT" * 99])
def test_a_long_run_without_a_blank_is_cut_too(tmp_path, monkeypatch, text):
    for name, size in (("BLOCK", 20), ("LONGEST", 30), ("NEAR", 10)):
        monkeypatch.setattr(pieces, name, size)
    one = one_text(tmp_path, text)
    found = list(one.pieces(0, one.size))
    assert "".join(found) == text
    assert max(map(len, found)) <= 50
    tokens = [token for piece in found for token in TINY.encode_ordinary(piece)]
    assert "A" in text or tokens == TINY.encode_ordinary(text)


def test_a_text_that_is_cut_inside_a_word_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ACGT" * 300)
    prepared(tmp_path, "gpt2")
    assert "cut between two characters" in capsys.readouterr().err


# Documents --------------------------------------------------------------------------------------


DOCUMENTS = st.lists(
    st.sampled_from(["", "a", "漢 " * 9, "x\r\ny", MARK, "text " * 20]), min_size=2, max_size=30
)


@given(
    documents=DOCUMENTS,
    kind=st.sampled_from(("jsonl", "parquet", "txt")),
    tokenizer=st.sampled_from(("gpt2", "byte", "char")),
    fraction=st.sampled_from((0.01, 0.1, 0.5, 0.99)),
)
@example(documents=["one", "two", "three"], kind="jsonl", tokenizer="gpt2", fraction=0.1)
@example(documents=["one", "two"], kind="txt", tokenizer="byte", fraction=0.99)
@settings(max_examples=30, deadline=None)
def test_documents_are_read_once_and_no_split_is_empty(documents, kind, tokenizer, fraction):
    with tempfile.TemporaryDirectory() as folder:
        if kind == "jsonl":
            write_lines(Path(folder) / "a.jsonl", documents)
        elif kind == "parquet":
            write_parquet(Path(folder) / "a.parquet", documents)
        else:
            for i, text in enumerate(documents):
                (Path(folder) / f"{i:03d}.txt").write_bytes(text.encode())
            documents = [text.removeprefix(MARK) for text in documents]
        if not any(documents):
            return
        name = "openwebtext" if kind == "txt" else "text"
        dataset = prepared(folder, tokenizer, name, validation_fraction=fraction)
    assert len(dataset.train)
    assert len(dataset.validation)
    if tokenizer == "gpt2":
        assert sorted(text_of(dataset, "<end>").split("<end>")[:-1]) == sorted(documents)
    else:  # a line end after each, which they may hold too
        assert sorted(text_of(dataset)) == sorted("".join(f"{text}\n" for text in documents))


def test_a_corpus_of_one_document_is_for_training(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["only"])
    for fraction in (0.1, 0.9):
        dataset = prepared(tmp_path, "gpt2", validation_fraction=fraction)
        assert text_of(dataset._replace(validation=dataset.train.first(0))) == "only"


def test_documents_without_a_text_are_counted_and_left_out(tmp_path, capsys):
    lines = [{"text": "a"}, {"text": None}, {"text": 7}, {"body": "b"}, ["c"], {"text": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_parquet(tmp_path / "b.parquet", ["e", None, "f"])
    assert sorted(text_of(prepared(tmp_path, "gpt2"))) == list("adef")
    assert "5 documents without a text" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 3])
def test_a_corpus_in_which_no_document_has_a_text_is_refused(tmp_path, count):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * count)
    write_parquet(tmp_path / "b.parquet", [b"bytes"] * count)
    for _ in range(2):  # what was written is of no use
        with pytest.raises(UserError, match=r"data\.field"):
            prepared(tmp_path, "gpt2")


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
@pytest.mark.parametrize("content", [MARK, "", f"{MARK}\n\n"])
def test_a_corpus_without_text_is_refused(tmp_path, tokenizer, content):
    name = "a.jsonl" if content.strip(MARK) else "a.txt"
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError):
        prepared(tmp_path, tokenizer)


def test_a_wrong_field_is_noticed_soon_and_only_at_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("nrgpt_jax.datasets.documents.WRONG_FIELD", 3)
    (tmp_path / "a.jsonl").write_text('{"body": "b"}\n' * 3 + "this would not be JSON\n")
    with pytest.raises(UserError, match=r"data\.field"):
        prepared(tmp_path, "gpt2")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 3 + '{"text": "a"}\n{"text": "b"}\n')
    assert sorted(text_of(prepared(tmp_path, "gpt2"))) == ["a", "b"]
    monkeypatch.setattr(parts, "PART_BYTES", 60)
    lines = ['{"text": "a"}'] * 5 + ['{"body": "b"}'] * 30 + ['{"text": "a"}'] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert text_of(prepared(tmp_path, "gpt2")) == "a" * 10


# Folders ----------------------------------------------------------------------------------------


def fill(folder):
    """A corpus of ABCDE with capital endings, marks, and what editors and desktops leave."""
    files = {"a.txt": "A", "B.TXT": MARK + "B", "part/c.Txt": "C", ".hidden.txt": "x"}
    files |= {".ipynb_checkpoints/a-checkpoint.txt": "x", "part/._c.txt": "\0x", ".git/d.txt": "x"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_hidden_files_are_no_corpus_and_capital_endings_are(tmp_path):
    fill(tmp_path / ".corpora")  # the folder that is named itself may be hidden
    for place in (tmp_path / ".corpora", f"file://{tmp_path}/.corpora"):
        found = list_files(str(place), (".txt",))
        assert [file.name for file in found] == ["B.TXT", "a.txt", "part/c.Txt"]
        one = Text(found)
        assert "".join(one.pieces(0, one.size)) == "B\nA\nC"
    (tmp_path / ".corpora" / "broken.txt").symlink_to("nowhere")
    write_lines(tmp_path / ".corpora" / "D.JSONL", ["D"])
    write_parquet(tmp_path / ".corpora" / "E.PARQUET", ["E"])
    write_lines(tmp_path / "f.jsonl.gz", ["F"])
    (tmp_path / "f.jsonl.gz").rename(tmp_path / ".corpora" / "F.JSONL.GZ")
    assert sorted(text_of(prepared(tmp_path / ".corpora", "gpt2"))) == list("ABCDEF")


def test_a_mark_is_no_text_in_any_format(tmp_path):
    (tmp_path / "a.jsonl").write_text(MARK + '{"text": "a"}\n{"text": "b"}\n')
    assert sorted(text_of(prepared(tmp_path, "gpt2"))) == ["a", "b"]
    article = " = T = \n \n x \n"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(MARK + article)
    assert text_of(prepared(tmp_path, "gpt2", name="wikitext")) == article * 2


def test_text_of_several_files_is_cut_in_all_places(tmp_path, monkeypatch):
    """Marks do not move what parts hold."""
    for i, text in enumerate(TEXTS[:9]):
        (tmp_path / f"{i}.txt").write_text(MARK * (i % 2) + text)
    monkeypatch.setattr(parts, "PART_BYTES", 20)
    whole = "\n".join(TEXTS[:9])
    for tokenizer in ("char", "byte"):
        assert text_of(prepared(tmp_path, tokenizer)) == whole
    one = Text(list_files(str(tmp_path), (".txt",)))
    assert one.size == len(whole.encode())
    random = np.random.default_rng(0)
    for start, stop in np.sort(random.integers(0, one.size + 1, (50, 2))):
        found = b"".join(block for _, block in one.blocks(start, stop))
        assert found == whole.encode()[start:stop]
