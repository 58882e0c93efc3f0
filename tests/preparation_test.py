"""Preparation: every token once, in order, whatever the parts; killed and damaged, it goes on."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from preparation_helpers import TEXTS, data_of, write_lines, write_parquet
from tokens_helpers import needs_gpt2, tiny_gpt2

from nrgpt_jax.datasets import (
    corpora,
    load_dataset,
    parts,
    pieces,
    preparation,
    shards,
)
from nrgpt_jax.datasets.files import list_files
from nrgpt_jax.datasets.pieces import Text
from nrgpt_jax.datasets.pipeline import train_batches, validation_batches
from nrgpt_jax.datasets.preparation import Engine
from nrgpt_jax.errors import UserError


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 700)
    monkeypatch.setattr(shards, "RECORD_TOKENS", 50)
    monkeypatch.setattr(corpora, "WHOLE", 0)


def documents_of(tokens):
    """Bytes to documents; each has one line end of its own and one after it."""
    return bytes(tokens.astype(np.uint8)).decode().split("\n\n")[:-1]


@pytest.fixture
def folder(tmp_path, small_parts):
    """All formats, in the order of their names, and files that are cut and files that are not."""
    write_lines(tmp_path / "a.jsonl", TEXTS[:100])
    write_lines(tmp_path / "b.json.gz", TEXTS[100:200])
    write_parquet(tmp_path / "c.parquet", TEXTS[200:300])
    (tmp_path / "d").mkdir()
    for i, text in enumerate(TEXTS[300:]):
        (tmp_path / "d" / f"{i:03d}.txt").write_text(text)
    return tmp_path


def test_every_document_once_and_in_order_from_every_format(folder):
    dataset = load_dataset(data_of(folder))
    train, validation = documents_of(dataset.train.tokens), documents_of(dataset.validation.tokens)
    whole = [text.removesuffix("\n") for text in TEXTS]
    assert sorted(train + validation) == sorted(whole)
    assert train == [text for text in whole if text in train]
    assert validation == [text for text in whole if text in validation]
    assert 10 < len(validation) < 90, "a tenth of 400"


def test_the_split_does_not_depend_on_the_parts(folder, monkeypatch):
    cut = load_dataset(data_of(folder))
    prepared = list(corpora.prepare_corpus(data_of(folder), preparation.LOCAL).glob("*-train*"))
    assert len(prepared) > 5
    monkeypatch.setattr(parts, "PART_BYTES", 2**26)
    whole = load_dataset(data_of(folder))
    assert corpora.prepare_corpus(data_of(folder), preparation.LOCAL) != prepared[0].parent
    np.testing.assert_array_equal(cut.train.tokens, whole.train.tokens)
    np.testing.assert_array_equal(cut.validation.tokens, whole.validation.tokens)


def test_windows_in_place_are_those_in_memory(folder, monkeypatch):
    in_place = load_dataset(data_of(folder))
    monkeypatch.setattr(corpora, "WHOLE", 2**24)
    in_memory = load_dataset(data_of(folder))
    assert type(in_place.train) is not type(in_memory.train)
    assert in_place.fingerprint == in_memory.fingerprint
    again = in_place._replace(train=pickle.loads(pickle.dumps(in_place.train)))
    for one in (in_place, again):
        batches = [train_batches(d.train, 70, 8, 3) for d in (one, in_memory)]
        for _ in range(20):
            for a, b in zip(*map(next, batches), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
    both = (validation_batches(d.validation, 70, 8) for d in (in_place, in_memory))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)


def test_a_prepared_folder_is_a_tfds_data_set_and_a_corpus(folder):
    dataset = load_dataset(data_of(folder))
    prepared = corpora.prepare_corpus(data_of(folder), preparation.LOCAL)
    source = tfds.builder_from_directory(prepared).as_data_source("train")
    found = np.concatenate([record["tokens"] for record in source])
    np.testing.assert_array_equal(found, dataset.train.tokens)
    again = load_dataset(data_of(prepared))
    assert again.fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match=r"data\.tokenizer=byte"):
        load_dataset(data_of(prepared, tokenizer="gpt2"))


def test_names_change_with_settings_and_generator(folder, monkeypatch):
    names = {corpora.prepare_corpus(data_of(folder), preparation.LOCAL).parent.name}
    other = data_of(folder, validation_fraction=0.2)
    names.add(corpora.prepare_corpus(other, preparation.LOCAL).parent.name)
    monkeypatch.setattr(corpora, "GENERATOR", corpora.GENERATOR + 1)
    names.add(corpora.prepare_corpus(data_of(folder), preparation.LOCAL).parent.name)
    assert len(names) == 3


def test_files_that_name_their_split_keep_it(tmp_path):
    write_lines(tmp_path / "c4-train.00000-of-00001.json.gz", TEXTS[:50])
    write_lines(tmp_path / "c4-validation.00000-of-00001.json.gz", TEXTS[50:60])
    dataset = load_dataset(data_of(tmp_path, name="c4"))
    assert len(documents_of(dataset.train.tokens)) == 50
    assert len(documents_of(dataset.validation.tokens)) == 10
    (tmp_path / "c4-train.00000-of-00001.json.gz").unlink()
    with pytest.raises(UserError, match="none for training"):
        load_dataset(data_of(tmp_path, name="c4"))


def test_folders_name_splits_too(tmp_path, capsys):
    for split, texts in (("train", TEXTS[:50]), ("validation", TEXTS[50:60])):
        (tmp_path / split).mkdir()
        write_lines(tmp_path / split / "00000.jsonl", texts)
    dataset = load_dataset(data_of(tmp_path))
    assert len(documents_of(dataset.train.tokens)) == 50
    assert len(documents_of(dataset.validation.tokens)) == 10
    assert "drawn" not in capsys.readouterr().err
    assert parts.own_split("train/part/test-1.jsonl") == "test", "the file's own name goes first"


def test_a_file_named_test_is_never_drawn_for_training(tmp_path, capsys):
    write_lines(tmp_path / "test.jsonl", ["never " * 5] * 40)
    with pytest.raises(UserError, match="none for training"):
        load_dataset(data_of(tmp_path))
    for name, because in (
        ("train", "no file is named for validation"),
        ("more", "more.jsonl names no split"),
    ):
        write_lines(tmp_path / f"{name}.jsonl", TEXTS[:100])
        dataset = load_dataset(data_of(tmp_path))
        tokens = np.concatenate([dataset.train.tokens, dataset.validation.tokens])
        assert b"never" not in bytes(tokens.astype(np.uint8))
        told = capsys.readouterr().err
        assert f"{because}: each document is drawn" in told
        assert "but for files named test" in told


ARTICLES = [
    " \n = One ( a song ) = \n \n Text = 3 = \n = not a title = \n \n = = Part = = \n \n more \n",
    " = Two = \n \n Text \n \n",
    " = Three = \n \n end \n",
]


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_articles_of_wikitext(tmp_path, kind):
    articles = [ARTICLES[0] + " \n", *ARTICLES[1:]]
    for split in ("train", "valid"):
        lines = "".join(articles).splitlines(keepends=True)
        if kind == "text":
            (tmp_path / f"wiki.{split}.raw").write_text("".join(lines))
        else:
            write_parquet(tmp_path / f"{split}-0.parquet", lines, group=2)
    dataset = load_dataset(data_of(tmp_path, name="wikitext"))
    found = bytes(dataset.train.tokens.astype(np.uint8)).decode()
    assert found == "".join(article + "\n" for article in articles)


# GPT-2 ------------------------------------------------------------------------------------------


def test_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 40)
    rng, encode = np.random.default_rng(0), tiny_gpt2().encode_ordinary
    alphabet = ["the", "b", " ", "  ", "\n", "\n\n", "\t", "é", "漢", "\u3000", "\xa0", "\x85"]
    alphabet += ["\u2003", "\u2028", "'s", "12", ".", "\x1c", "😀", " x"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet, size=rng.integers(1, 200)))
        (tmp_path / "a.txt").write_bytes(text.encode())
        one = Text(list_files(str(tmp_path / "a.txt"), (".txt",)))
        found = list(one.pieces(0, one.size))
        assert "".join(found) == text
        assert [t for piece in found for t in encode(piece)] == encode(text)
        at, within = map(int, rng.integers(0, one.size + 1, size=2))
        place, clean = one.place_to_cut(at, within)
        assert at <= place <= at + max(within, 3), "three more bytes of a character at most"
        halves = "".join(one.pieces(0, place)), "".join(one.pieces(place, one.size))
        assert "".join(halves) == text
        assert not clean or [t for half in halves for t in encode(half)] == encode(text)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_documents_by_characters_and_bytes(tmp_path, kind, tokenizer):
    """Each is followed by a line end, wherever it is drawn to."""
    place = tmp_path / f"docs.{kind}"
    (write_parquet if kind == "parquet" else write_lines)(place, TEXTS[:40])
    found = load_dataset(data_of(place, name="text", tokenizer=tokenizer))
    text = "".join(found.tokenizer.decode(s.tokens) for s in (found.train, found.validation))
    assert sorted(text) == sorted("".join(text + "\n" for text in TEXTS[:40]))


@needs_gpt2
def test_tokens_are_those_of_tiktoken(folder):
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    dataset = load_dataset(data_of(folder, tokenizer="gpt2"))
    train = dataset.train.tokens
    ends = np.flatnonzero(train == encoding.eot_token)
    found = [encoding.decode(part.tolist()) for part in np.split(train, ends + 1)[:-1]]
    kept = [text for text in TEXTS if text + "<|endoftext|>" in found]
    assert len(found) == len(kept)
    expected = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in kept]
    assert train.tolist() == [token for tokens in expected for token in tokens]
    (folder / "one.txt").write_text("".join(TEXTS))
    one = load_dataset(data_of(folder / "one.txt", name="text", tokenizer="gpt2"))
    both = np.concatenate([one.train.tokens, one.validation.tokens]).tolist()
    assert both == [*encoding.encode_ordinary("".join(TEXTS)), encoding.eot_token]


# Killed and damaged -----------------------------------------------------------------------------


def test_what_is_written_is_kept_and_what_is_missing_is_made(folder, monkeypatch):
    data = data_of(folder)
    expected = load_dataset(data_of(folder, validation_fraction=0.1)).train.tokens
    made, write = list[int](), preparation.write_part

    def counted(task):
        made.append(task.number)
        write(task)

    monkeypatch.setattr(preparation, "write_part", counted)
    prepared = corpora.prepare_corpus(data, preparation.LOCAL)
    (prepared / "dataset_info.json").unlink()
    paths = sorted(prepared.glob("*-train.array_record-*"))
    paths[2].unlink()
    paths[4].write_bytes(paths[4].read_bytes()[:-1])
    load_dataset(data)
    assert made == [2, 4]
    np.testing.assert_array_equal(load_dataset(data).train.tokens, expected)


def test_a_part_is_made_anew_when_what_lies_at_the_address_has_changed(folder, monkeypatch):
    """An address keeps its name; a resumed preparation must not mix what was there and what is."""
    place = f"file://{folder}"
    prepared = corpora.prepare_corpus(data_of(place), preparation.LOCAL)
    (prepared / "dataset_info.json").unlink()
    changed = [text.upper() for text in TEXTS[:99]] + [TEXTS[99] + "x"]
    write_lines(folder / "a.jsonl", changed)
    after = load_dataset(data_of(place))
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(folder / "another"))
    expected = load_dataset(data_of(place))
    np.testing.assert_array_equal(after.train.tokens, expected.train.tokens)


def test_partial_files_of_two_workers_have_different_names(tmp_path):
    assert shards._partial(tmp_path / "a") != shards._partial(tmp_path / "a")


def test_the_identity_of_a_text_part_names_the_files_it_holds(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("text ")
    one = Text(list_files(str(tmp_path), (".txt",)))  # six bytes each with the line end between
    held = lambda start, stop: [file.name for file in one.files_of(start, stop)[0]]
    assert (held(0, 5), held(0, 6), held(0, 7)) == (["a.txt"], ["a.txt"], ["a.txt", "b.txt"])
    assert held(6, 17) == ["b.txt", "c.txt"]
    assert one.files_of(12, 13)[1] == 12


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_shard_is_one_line(folder, damage):
    data = data_of(folder, validation_fraction=0.3)
    prepared = corpora.prepare_corpus(data, preparation.LOCAL)
    shard = sorted(prepared.glob("*-train.array_record-*"))[1]
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"remove dataset_info\.json") as error:
        load_dataset(data)
    assert str(shard) in str(error.value)
    shard.write_bytes(whole)
    stream = load_dataset(data).train
    shard.write_bytes(b"\0" * len(whole))
    with pytest.raises(UserError, match=shard.name):
        stream.read(0, len(stream))


def test_a_damaged_copy_is_to_be_copied_again(folder, tmp_path_factory):
    """A prepared folder that is named itself may be far from the corpus that it was made of."""
    made = corpora.prepare_corpus(data_of(folder, validation_fraction=0.4), preparation.LOCAL)
    copy = shutil.copytree(made, tmp_path_factory.mktemp("copy") / "prepared")
    shard = sorted(copy.glob("*-train.array_record-*"))[0]
    whole = shard.read_bytes()
    messages = []
    for damage in (b"\0" * len(whole), whole[:-1]):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match="copy that folder again") as error:
            load_dataset(data_of(copy)).train.read(0, 60)
        messages.append(str(error.value))
    (copy / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="copy that folder again") as error:
        load_dataset(data_of(copy))
    assert not any("remove" in message for message in [*messages, str(error.value)])


KILLED = """
import os, signal, sys
from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets import corpora, parts, preparation
parts.PART_BYTES = preparation.PART_BYTES = 2000
data = default_config().data
data.update({"name": "openwebtext", "tokenizer": "byte", "path": sys.argv[1]})
corpora.prepare_corpus(data, preparation.Engine(workers=2))
"""


def test_a_killed_preparation_goes_on(tmp_path, monkeypatch):
    """Killed as hard as can be, while two workers write; neither runs the script once more."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_lines(corpus / "a.jsonl", TEXTS * 20)
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(corpus)])
    written = lambda: list((tmp_path / "cache").rglob("progress/*.json"))
    while len(written()) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    assert not list((tmp_path / "cache").rglob("dataset_info.json"))
    for folder in written()[0].parents[:2]:
        (folder / "a.partial-1").touch()
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    dataset = load_dataset(data_of(corpus))
    found = documents_of(np.concatenate([dataset.train.tokens, dataset.validation.tokens]))
    assert sorted(found) == sorted(text.removesuffix("\n") for text in TEXTS * 20)
    assert not list((tmp_path / "cache").rglob("*.partial-*"))


def test_nothing_is_left_of_a_worker_that_outlives_its_killed_parent(tmp_path, monkeypatch):
    """It may begin a shard after what was begun before it has been removed."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(tmp_path / "cache"))
    begun = []

    def document_parts(*args, cut=parts.document_parts):
        folder = next((tmp_path / "cache").rglob("progress")).parent
        begun.append(folder / "late.partial-1")
        begun[0].touch()
        return cut(*args)

    monkeypatch.setattr(parts, "document_parts", document_parts)
    load_dataset(data_of(tmp_path / "a.jsonl"))
    assert begun
    assert not begun[0].exists()


def test_beam_makes_the_same(folder, monkeypatch, tmp_path_factory):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed")
    expected = load_dataset(data_of(folder))
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(tmp_path_factory.mktemp("beam")))
    options = "--runner=DirectRunner --direct_running_mode=in_memory"
    corpora.prepare_corpus(data_of(folder), Engine(beam_options=options))
    assert load_dataset(data_of(folder)).fingerprint == expected.fingerprint
