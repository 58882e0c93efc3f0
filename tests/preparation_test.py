"""Preparation: every token once, in order, whatever the parts; killed and damaged, it resumes."""

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

from nrgpt_jax.datasets import corpora, load_dataset, parts, pieces, preparation, shards
from nrgpt_jax.datasets.files import list_files
from nrgpt_jax.datasets.pieces import Text
from nrgpt_jax.datasets.pipeline import train_batches, validation_batches
from nrgpt_jax.errors import UserError


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 700)
    monkeypatch.setattr(shards, "RECORD_TOKENS", 50)
    monkeypatch.setattr(corpora, "WHOLE", 0)


def documents_of(tokens):
    """Bytes to documents; each has one line end of its own and one after it."""
    return bytes(tokens.astype(np.uint8)).decode().split("\n\n")[:-1]


def tokens_of(dataset):
    return np.concatenate([dataset.train.tokens, dataset.validation.tokens])


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
    prepared = list(corpora.prepare_corpus(data_of(folder)).glob("*-train*"))
    assert len(prepared) > 5
    monkeypatch.setattr(parts, "PART_BYTES", 2**26)
    whole = load_dataset(data_of(folder))
    assert corpora.prepare_corpus(data_of(folder)) != prepared[0].parent
    np.testing.assert_array_equal(cut.train.tokens, whole.train.tokens)
    np.testing.assert_array_equal(cut.validation.tokens, whole.validation.tokens)


def test_a_corpus_of_earlier_versions_keeps_its_fingerprint(tmp_path, small_parts):
    """It depends on every token and on how the corpus is cut into parts."""
    write_lines(tmp_path / "a.jsonl", TEXTS[:100])
    assert load_dataset(data_of(tmp_path)).fingerprint == "a98eb9c040c8"


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
    prepared = corpora.prepare_corpus(data_of(folder))
    source = tfds.builder_from_directory(prepared).as_data_source("train")
    found = np.concatenate([record["tokens"] for record in source])
    np.testing.assert_array_equal(found, dataset.train.tokens)
    again = load_dataset(data_of(prepared))
    assert again.fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match=r"data\.tokenizer=byte"):
        load_dataset(data_of(prepared, tokenizer="gpt2"))


def test_names_change_with_settings_and_generator(folder, monkeypatch):
    names = {corpora.prepare_corpus(data_of(folder)).parent.name}
    names.add(corpora.prepare_corpus(data_of(folder, validation_fraction=0.2)).parent.name)
    monkeypatch.setattr(corpora, "GENERATOR", corpora.GENERATOR + 1)
    names.add(corpora.prepare_corpus(data_of(folder)).parent.name)
    assert len(names) == 3


@pytest.mark.parametrize("name", ["c4-{}.00000-of-00001.json.gz", "{}/00000.jsonl"])
def test_files_and_folders_that_name_their_split_keep_it(tmp_path, capsys, name):
    for split, texts in (("train", TEXTS[:50]), ("validation", TEXTS[50:60])):
        (tmp_path / name.format(split)).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name.format(split), texts)
    dataset = load_dataset(data_of(tmp_path, name="c4"))
    assert len(documents_of(dataset.train.tokens)) == 50
    assert len(documents_of(dataset.validation.tokens)) == 10
    assert "drawn" not in capsys.readouterr().err
    (tmp_path / name.format("train")).unlink()
    with pytest.raises(UserError, match="none for training"):
        load_dataset(data_of(tmp_path, name="c4"))
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
        assert b"never" not in bytes(tokens_of(load_dataset(data_of(tmp_path))).astype(np.uint8))
        assert f"{because}: each document is drawn" in capsys.readouterr().err


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
    alphabet = ["the", "b", " ", "  ", "\n", "\r\n", "\n\n", "\t", "\v", "\f", "é", "漢", "\u3000"]
    alphabet += ["\xa0", "\x85", "\u2003", "\u2028", "'s", "don't", "12", ".", "\x1c", "😀", " x"]
    alphabet += ["漢字", "、", "。", "क्षि", "ACGT"]
    for _ in range(300):
        few = rng.choice(alphabet, size=rng.integers(1, 12))
        text = "".join(rng.choice(few, size=rng.integers(1, 200)))
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
    one = tokens_of(load_dataset(data_of(folder / "one.txt", name="text", tokenizer="gpt2")))
    assert one.tolist() == [*encoding.encode_ordinary("".join(TEXTS)), encoding.eot_token]


# Killed and damaged -----------------------------------------------------------------------------


def test_what_is_written_is_kept_and_what_is_missing_is_made(folder, monkeypatch):
    data, made, write = data_of(folder), list[str](), preparation.write_part
    expected = load_dataset(data_of(folder, validation_fraction=0.1)).train.tokens

    def counted(task):
        made.append(task.record.stem)
        write(task)

    monkeypatch.setattr(preparation, "write_part", counted)
    prepared = corpora.prepare_corpus(data)
    (prepared / "dataset_info.json").unlink()
    paths = sorted(prepared.glob("*-train.array_record-*"))
    paths[2].unlink()
    paths[4].write_bytes(paths[4].read_bytes()[:-1])
    load_dataset(data)
    assert made == ["00002", "00004"]
    np.testing.assert_array_equal(load_dataset(data).train.tokens, expected)


def test_a_part_is_written_again_when_what_lies_at_the_address_has_changed(folder, monkeypatch):
    """An address keeps its name; a resumed preparation must not mix what was there and what is."""
    place = f"file://{folder}"
    prepared = corpora.prepare_corpus(data_of(place))
    (prepared / "dataset_info.json").unlink()
    (prepared / "openwebtext-test.array_record-00000-of-00001").touch()  # of a file that is gone
    changed = [text.upper() for text in TEXTS[:99]] + [TEXTS[99] + "x"]
    write_lines(folder / "a.jsonl", changed)
    after = load_dataset(data_of(place))
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(folder / "another"))
    expected = load_dataset(data_of(place))
    np.testing.assert_array_equal(after.train.tokens, expected.train.tokens)


@pytest.mark.parametrize("copied", [False, True])
def test_a_damaged_shard_is_one_line(folder, tmp_path_factory, copied):
    """A prepared folder that is named itself may be far from the corpus that it was made of."""
    data = data_of(folder, validation_fraction=0.3)
    prepared = corpora.prepare_corpus(data)
    if copied:
        prepared = shutil.copytree(prepared, tmp_path_factory.mktemp("copy") / "prepared")
        data = data_of(prepared)
    cure = "copy that folder again" if copied else r"remove .*dataset_info\.json"
    shard = sorted(prepared.glob("*-train.array_record-*"))[1]
    whole, metadata = shard.read_bytes(), prepared / "metadata.json"
    text = metadata.read_text()

    def refused(file, content):
        file.write_bytes(content)
        with pytest.raises(UserError, match=cure) as error:
            load_dataset(data).train.tokens  # noqa: B018
        assert "\n" not in str(error.value)
        return str(error.value)

    for damaged in (whole[:-10], b"\0" * len(whole)):
        assert str(shard) in refused(shard, damaged)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing; "):
        load_dataset(data)
    shard.write_bytes(whole)
    for content in ("{", "[]", text.replace('"dtype"', '"type"'), text.replace('"byte"', '"x"')):
        refused(metadata, content.encode())
    metadata.write_text(text)
    assert len(load_dataset(data).train)


KILLED = """
import os, signal, sys
from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets import corpora, parts, preparation
parts.PART_BYTES = preparation.PART_BYTES = 2000
data = default_config().data
data.update({"name": "openwebtext", "tokenizer": "byte", "path": sys.argv[1]})
corpora.prepare_corpus(data, workers=2)
"""


@pytest.mark.ci
def test_a_killed_preparation_resumes(tmp_path, monkeypatch):
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
    found = documents_of(tokens_of(load_dataset(data_of(corpus))))
    assert sorted(found) == sorted(text.removesuffix("\n") for text in TEXTS * 20)
    assert not list((tmp_path / "cache").rglob("*.partial-*"))


def test_a_kill_that_left_an_empty_record_of_the_whole_is_mended(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setenv("NRGPT_CACHE_DIR", str(tmp_path / "cache"))
    before = load_dataset(data_of(tmp_path / "a.jsonl")).fingerprint
    [info] = (tmp_path / "cache").rglob("dataset_info.json")
    info.write_text("")
    assert load_dataset(data_of(tmp_path / "a.jsonl")).fingerprint == before


def test_nothing_is_left_of_a_worker_that_outlives_its_killed_parent(tmp_path, monkeypatch):
    """It may begin a shard after what was begun before it has been removed."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write, begun = preparation.write_part, []

    def write_part(task):
        write(task)
        begun.append(task.record.parent.parent / "late.partial-1")
        begun[0].touch()

    monkeypatch.setattr(preparation, "write_part", write_part)
    load_dataset(data_of(tmp_path / "a.jsonl"))
    assert begun
    assert not begun[0].exists()
