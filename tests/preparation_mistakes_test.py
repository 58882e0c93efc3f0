"""What cannot be prepared is one line that names the cause and the cure."""

import fcntl
import gzip
import sys

import fsspec
import pytest
from array_record.python import array_record_module
from fsspec.implementations.memory import MemoryFileSystem
from preparation_helpers import TEXTS, data_of, write_lines, write_parquet

from nrgpt_jax.datasets import documents, load_dataset, pieces, preparation
from nrgpt_jax.datasets.files import list_files
from nrgpt_jax.datasets.pipeline import check_length, validation_batches
from nrgpt_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"te', "byte 14: the line is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "byte 0: the line is not JSON"),
        ("a.json.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "is cut short"),
        ("a.json.gz", b"not packed", "cannot be read"),
        ("a.parquet", b"PAR1 is not all", "is no whole Parquet file"),
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.txt", b"the end \xc3", "is not UTF-8"),
        ("a.txt", b"", "the corpus is empty"),
        ("a.pdf", b"%PDF", "has no .jsonl or"),
    ],
)
@pytest.mark.parametrize(("corpus", "tokenizer"), [("openwebtext", "byte"), ("text", "char")])
def test_a_bad_file_is_one_line(tmp_path, name, content, message, corpus, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_dataset(data_of(tmp_path, name=corpus, tokenizer=tokenizer))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) or not content


def test_half_a_surrogate_pair_becomes_a_mark(tmp_path):
    """Escaped or as bytes, and in a text that is cut: the rest of the corpus is kept."""
    lines = [
        rb'{"text": "a\ud800b"}',
        b'{"text": "a\xed\xa0\x80b"}',
        rb'{"text": "\ud83d\ude00"}',
    ]
    lines.append(b'{"text": "\xed\xa0\x80' + b"and on " * pieces.BLOCK + b'"}')
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    file = list_files(str(tmp_path), (".jsonl",))[0]
    found = ["".join(document.pieces or ()) for document in documents.read_documents(file, "text")]
    assert found[:3] == ["a\ufffdb", "a\ufffdb", "😀"]
    assert found[3].startswith("\ufffdand on ")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS[:9])
    (tmp_path / "cache").touch()
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(tmp_path / "cache"))
    for data in (data_of(tmp_path), data_of("", name="listops")):
        with pytest.raises(UserError, match=r"cannot be written .*NRGPT_CACHE_DIR") as error:
            load_dataset(data)
        assert str(tmp_path / "cache") in str(error.value)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS[:9])

    def write(self, record):
        raise RuntimeError("write() failed: No space left on device;\nat byte 0")

    monkeypatch.setattr(array_record_module.ArrayRecordWriter, "write", write)
    with pytest.raises(UserError, match=r"No space left on device; at .*NRGPT_CACHE_DIR"):
        load_dataset(data_of(tmp_path))


def test_waiting_for_another_process_is_told(tmp_path, capsys, monkeypatch):
    first = preparation._alone(tmp_path)
    first.__enter__()
    flock = fcntl.flock

    def let_go(file, how):
        if not how & fcntl.LOCK_NB:
            first.__exit__(None, None, None)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", let_go)
    with preparation._alone(tmp_path):
        assert f"waiting for another process that prepares {tmp_path}" in capsys.readouterr().err
    with preparation._alone(tmp_path):
        assert "waiting" not in capsys.readouterr().err


def test_an_address_of_one_file_of_which_a_listing_says_nothing(monkeypatch):
    """As that of https is."""
    with fsspec.open("memory://here/a.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n' * 9)
    monkeypatch.setattr(MemoryFileSystem, "find", lambda self, path, **_: {path: {}})
    (file,) = list_files("memory://here/a.jsonl", (".jsonl",))
    assert (file.name, file.size) == ("a.jsonl", 9 * 14)
    assert len(load_dataset(data_of("memory://here/a.jsonl", name="text")).train)


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, field="content")
    with pytest.raises(UserError, match="no column 'text' but content, id"):
        load_dataset(data_of(tmp_path))
    assert len(load_dataset(data_of(tmp_path, field="content")).train)


def test_a_place_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    for corpus in ("openwebtext", "text"):
        with pytest.raises(UserError, match="does not exist"):
            load_dataset(data_of(tmp_path / "none", name=corpus))
    with pytest.raises(UserError, match=r"data\.path is empty"):
        load_dataset(data_of("", name="text"))
    with pytest.raises(UserError, match="does not exist or cannot be reached"):
        load_dataset(data_of("memory://no-such-bucket/corpus"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[s3\]'"):
        load_dataset(data_of("s3://bucket/corpus"))


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        ("book.txt.gz", "char", "is not UTF-8"),
        ("book.zip", "byte", "is not UTF-8"),
        ("book.txt.gz", "gpt2", "none of the endings that are read"),
        ("docs.jsonl.bz2", "gpt2", "none of the endings that are read"),
        ("docs.json", "gpt2", "none of the endings that are read"),
        ("book", "gpt2", "none of the endings that are read"),
    ],
)
def test_a_file_of_a_kind_that_is_not_read_is_one_line(tmp_path, name, tokenizer, message):
    (tmp_path / name).write_bytes(gzip.compress(b"the text " * 100))
    with pytest.raises(UserError, match=rf"{message}.* unpack it") as error:
        load_dataset(data_of(tmp_path / name, name="text", tokenizer=tokenizer))
    assert name in str(error.value)


def test_articles_are_not_read_from_json_lines(tmp_path):
    write_lines(tmp_path / "wiki.train.jsonl", TEXTS[:9])
    for place in (tmp_path / "wiki.train.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"\.parquet(,| or) \.txt"):
            load_dataset(data_of(place, name="wikitext"))


@pytest.mark.parametrize("name", ["book", "book.md", "book.TXT"])
def test_plain_text_of_any_ending_is_read_by_characters(tmp_path, name):
    (tmp_path / name).write_text("the text " * 100)
    for tokenizer in ("char", "byte"):
        dataset = load_dataset(data_of(tmp_path / name, name="text", tokenizer=tokenizer))
        assert len(dataset.train) + len(dataset.validation) == 900


def test_an_empty_split_is_one_line_where_it_is_used(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS[:1])
    dataset = load_dataset(data_of(tmp_path))
    assert len(dataset.train)
    assert len(dataset.validation) == len(dataset.validation.tokens) == 0
    with pytest.raises(UserError, match="validation split has 0 tokens"):
        check_length(dataset.validation, 8, "validation")
    with pytest.raises(UserError, match="nothing to predict"):
        next(validation_batches(dataset.validation, 8, 1))
