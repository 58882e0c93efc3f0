"""Data sets: ListOps is generated as specified, text is split, kept and named correctly."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets import (
    download,
    listops,
    load_dataset,
    load_recorded,
    places,
    shards,
    tokenizers,
)
from nrgpt_jax.errors import UserError


def listops_settings(**fields):
    settings = default_config().data.listops
    settings.update({"num_train": 300, "num_test": 40, **fields})
    return settings


def listops_data(**fields):
    data = default_config().data
    data.name = "listops"
    data.listops = listops_settings(**fields)
    return data


def joined(dataset):
    return np.concatenate([dataset.train.tokens, dataset.validation.tokens])


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        (
            ("add", [0, ("median", [1, 7, 1]), 2]),
            ["add_10,(,0,median_10,(,1,7,1,),2,)", "add_10,(,0,1,2,)", "3,<eos>"],
        ),
        (
            ("max", [4, ("add", [5, ("max", [1, 2])]), ("median", [5, 4])]),
            [
                "max_10,(,4,add_10,(,5,max_10,(,1,2,),),median_10,(,5,4,),)",
                "max_10,(,4,add_10,(,5,2,),median_10,(,5,4,),)",
                "max_10,(,4,7,median_10,(,5,4,),)",
                "max_10,(,4,7,5,)",
                "7,<eos>",
            ],
        ),
    ],
)
def test_solutions_of_the_specification(expression, steps):
    """The deepest operation that is found first is simplified first."""
    assert ",".join(listops.solution(expression, 10)).split(",=,") == steps


@pytest.mark.parametrize(
    ("operation", "arguments", "value"),
    [("median", [9, 6], 9), ("median", [5, 4, 2], 4), ("add", [9, 8, 7], 4), ("nadd", [1, 3, 5], 3),
     ("max", [1, 8], 8), ("min", [3, 2], 2), ("prod", [5, 7], 5)],
)  # fmt: skip
def test_operations(operation, arguments, value):
    assert listops.OPERATIONS[operation](arguments) % 10 == value


def test_held_out_tuples_are_in_every_test_sample_and_in_no_training_sample():
    settings = listops_settings()
    generator = listops.Generator(settings)
    assert 45 <= len(generator.exclusions) <= 50
    metadata = shards.read_metadata(listops.prepare(settings))
    decode = listops.tokenizer(settings).decode
    splits = {
        split: [
            sample.strip(",").split(",")
            for sample in decode(shards.stream_of(metadata, split).tokens).split("<eos>")[:-1]
        ]
        for split in ("train", "test", "test_add", "test_max", "test_median")
    }
    assert [len(s) for s in splits.values()] == [300, 40, 40, 40, 40]
    assert not any(generator.is_excluded(symbols) for symbols in splits.pop("train"))
    for samples in splits.values():
        assert all(generator.is_excluded(symbols) for symbols in samples)
    (one, *_) = generator.exclusions
    assert generator.is_excluded(["max_10", "(", *one, ")"])
    assert not generator.is_excluded(["max_10", "(", *one[:2], "max_10", "(", one[2], ")", ")"])
    others = {"max_10", "median_10"}
    assert not others & set(itertools.chain(*splits["test_add"]))


def test_listops_data_set():
    dataset = load_dataset(listops_data())
    symbols = dataset.tokenizer.vocabulary
    assert symbols[:4] == ["<eos>", "(", ")", "="]
    assert symbols[-10:] == [str(d) for d in range(10)]
    assert len(symbols) == 20
    total = len(dataset.train) + len(dataset.validation)
    assert len(dataset.validation) == pytest.approx(0.1 * total, abs=1)
    assert (joined(dataset) == 0).sum() == 300
    prompts = dataset.prompts["listops"]
    for prompt, answer in zip(prompts.prompts, prompts.answers, strict=True):
        words = dataset.tokenizer.decode(prompt).split(",")
        assert words.index("=") == len(words) - 1
        assert dataset.tokenizer.decode([answer]).isdigit()


def test_questions_need_not_be_learned():
    every, solutions = (load_dataset(listops_data(learn_questions=q)).train for q in (True, False))
    np.testing.assert_array_equal(every.tokens, solutions.tokens)
    assert every.read(0, len(every))[1] is None
    words = np.array(load_dataset(listops_data()).tokenizer.vocabulary)[solutions.tokens]
    text = ",".join(words[: np.flatnonzero(words == "<eos>")[2] + 1])
    expected = []
    for sample in text.removesuffix(",<eos>").split(",<eos>,"):
        question, solution = sample.split(",=,", 1)
        expected += [0] * (len(question.split(",")) + 1) + [1] * (len(solution.split(",")) + 1)
    _, weights = solutions.read(0, len(expected))
    assert weights is not None
    assert weights.tolist() == expected


def test_listops_settings_matter_and_repeat():
    one, two = load_dataset(listops_data(seed=1)), load_dataset(listops_data(seed=1))
    np.testing.assert_array_equal(one.train.tokens, two.train.tokens)
    other = load_dataset(listops_data(seed=2))
    assert other.train.tokens[:50].tolist() != one.train.tokens[:50].tolist()
    modulus = load_dataset(listops_data(modulus=20))
    assert "add_20" in modulus.tokenizer.vocabulary
    assert modulus.tokenizer.vocabulary[-1] == "19"
    deep = load_dataset(listops_data(depth=3, function_probability=0.6))
    assert max(map(len, deep.prompts["listops"].prompts)) > 22


def test_impossible_exclusion_rate_ends(monkeypatch):
    monkeypatch.setattr(listops, "MOST_MISSES", 10)
    generator = listops.Generator(listops_settings())
    generator.exclusions = set()
    with pytest.raises(UserError, match="exclusion_rate"):
        list(generator.samples(1, True, ("max",)))


def text_data(path, **fields):
    data = default_config().data
    data.update({"name": "text", "path": str(path), **fields})
    return data


def test_text_file_and_folder(tmp_path):
    corpus = "".join(f"línea {i}: wörd\n" for i in range(200))
    (tmp_path / "a.txt").write_text(corpus[:1000])
    (tmp_path / "b.txt").write_text(corpus[1000:])
    dataset = load_dataset(text_data(tmp_path / "a.txt"))
    assert len(dataset.train) == 900
    assert dataset.tokenizer.decode(dataset.train.tokens) == corpus[:900]
    assert dataset.tokenizer.decode(dataset.validation.tokens) == corpus[900:1000]
    whole = load_dataset(text_data(tmp_path))
    assert whole.tokenizer.decode(joined(whole)) == corpus[:1000] + "\n" + corpus[1000:]
    as_bytes = load_dataset(text_data(tmp_path / "a.txt", tokenizer="byte"))
    assert as_bytes.tokenizer.decode(as_bytes.train.tokens) == corpus[:900]
    assert len(as_bytes.train) > 900


def test_a_folder_is_one_text_in_the_order_of_its_paths(tmp_path):
    """Folder by folder, as runs made before have read it: `part/` before `part.txt`."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part.txt").write_text("two")
    (tmp_path / "part" / "one.txt").write_text("one")
    dataset = load_dataset(text_data(tmp_path))
    assert dataset.tokenizer.decode(joined(dataset)) == "one\ntwo"


def test_download_is_checked_and_done_once(tmp_path, monkeypatch):
    source = tmp_path / "source.txt"
    source.write_text("hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    monkeypatch.setenv("NRGPT_DATA_DIR", str(tmp_path / "root"))
    path = download.fetch("x/input.txt", source.as_uri(), digest)
    assert path == tmp_path / "root/x/input.txt"
    source.unlink()
    assert download.fetch("x/input.txt", source.as_uri(), digest).read_text() == "hello"
    path.write_text("damaged")
    with pytest.raises(UserError, match="has sha256"):
        download.fetch("x/input.txt", source.as_uri(), digest)


def test_missing_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NRGPT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(places, "DATA_HOME", tmp_path / "none")
    url = (tmp_path / "nowhere").as_uri()
    with pytest.raises(UserError) as error:
        download.fetch("x/input.txt", url, "ab12")
    for part in (url, "ab12", str(tmp_path / "x/input.txt")):
        assert part in str(error.value)


def shakespeare_is_here():
    roots = [Path(os.environ.get("NRGPT_DATA_DIR", "nowhere")), places.DATA_HOME]
    return any((root / "shakespeare/input.txt").is_file() for root in roots)


@pytest.mark.skipif(not shakespeare_is_here(), reason="tiny Shakespeare is not in the data root")
def test_shakespeare_has_the_split_of_the_paper():
    data = default_config().data
    data.name = "shakespeare"
    dataset = load_dataset(data)
    assert (len(dataset.train), len(dataset.validation)) == (1_003_854, 111_540)
    assert len(dataset.tokenizer.vocabulary) == 65


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        (tokenizers.CharTokenizer("añb c𝄞"), "ab ñ𝄞"),
        (tokenizers.ByteTokenizer(), "ab ñ𝄞"),
        (tokenizers.SymbolTokenizer(["<eos>", "max_10", "(", "3"]), "max_10,(,3,<eos>"),
    ],
)
def test_tokenizers_round_trip_through_their_file(tokenizer, sentence, tmp_path):
    tokenizers.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    again = tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
    assert again.kind == tokenizer.kind
    tokens = again.encode(sentence)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, tokenizer.encode(sentence))
    assert again.decode(tokens) == sentence


def test_unknown_symbols_are_named():
    with pytest.raises(UserError, match="not in the vocabulary: 'x' 'é'"):
        tokenizers.CharTokenizer("abc").encode("axbé")
    with pytest.raises(UserError, match=r"not in the vocabulary: 'min_10'; .* commas"):
        tokenizers.SymbolTokenizer(["(", ")"]).encode("min_10,(,)")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '["a"]',
        "7",
        '{"kind": "char", "vocabulary": 7}',
        '{"kind": "char", "vocabulary": ["a", 7]}',
        '{"kind": "char", "vocabulary": ["a", "bc"]}',
        '{"kind": "symbol", "vocabulary": ["a", "a"]}',
        '{"kind": "symbol", "vocabulary": []}',
        '{"kind": "bpe", "vocabulary": ["a"]}',
        '{"kind": ["char"], "vocabulary": ["a"]}',
        '{"kind": "char", "vocabulary": ["b", "a"]}',
        '{"kind": "symbol", "vocabulary": ["a", "b,c"]}',
        '{"kind": "byte", "vocabulary": ["a", "b"]}',
        '{"kind": "byte", "size": 3}',
        pytest.param(json.dumps({"kind": "symbol", "vocabulary": ["a"] * (2**20 + 1)}), id="long"),
    ],
)
def test_a_foreign_tokenizer_file_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json (is damaged|cannot be read)"):
        tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="is it a run directory"):
        tokenizers.load_tokenizer(tmp_path / "none" / "tokenizer.json")


def test_a_tokenizer_file_knows_its_content(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.save_tokenizer(tokenizers.SymbolTokenizer("cab"), path)
    written, mark = path.read_bytes(), path.stat().st_mtime_ns
    tokenizers.save_tokenizer(tokenizers.SymbolTokenizer("cab"), path)
    assert path.stat().st_mtime_ns == mark, "the same content is not written again"
    assert tokenizers.load_tokenizer(path).vocabulary == ["c", "a", "b"]
    record = json.loads(written)
    path.write_text(json.dumps({**record, "vocabulary": record["vocabulary"][::-1]}))
    with pytest.raises(UserError, match="does not match its checksum"):
        tokenizers.load_tokenizer(path)
    del record["checksum"]
    path.write_text(json.dumps(record))  # as older versions wrote it
    assert tokenizers.load_tokenizer(path).vocabulary == ["c", "a", "b"]


def test_without_a_repository_data_goes_to_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert places._data_home(tmp_path / "site-packages") == tmp_path / "cache" / "nrgpt_jax"
    (tmp_path / "setup.cfg").touch()
    assert places._data_home(tmp_path) == tmp_path / "data"


def test_runs_on_text_of_earlier_versions_keep_their_fingerprint(tmp_path):
    """A name of the text itself and of the split, whatever the tokenizer and the prepared data."""
    (tmp_path / "a.txt").write_text("línea\n" * 50)
    (tmp_path / "b.txt").write_text("the end")
    text = "línea\n" * 50 + "\n" + "the end"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    expected = places.digest({"sha256": sha256, "validation_fraction": 0.1})
    for tokenizer in ("char", "byte"):
        data = text_data(tmp_path, tokenizer=tokenizer)
        assert load_dataset(data).fingerprint == expected
        data.fingerprint = expected
        assert len(load_recorded(data).train)
    data.fingerprint = "another"
    with pytest.raises(UserError, match="no longer the one"):
        load_recorded(data)
