"""Data sets by name: token streams for training and validation, prompts for evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nrgpt_jax.datasets import catalogue as _catalogue
from nrgpt_jax.datasets import corpora as _corpora
from nrgpt_jax.datasets import listops as _listops
from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.datasets.tokenizers import EOS, Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.registry import Registry


def ends_with(new: np.ndarray, answer: np.ndarray) -> float:
    """1 where the new tokens end with the answer, else 0."""
    answer = np.atleast_1d(answer)
    return float(len(new) >= len(answer) and np.array_equal(new[len(new) - len(answer) :], answer))


class Prompts(NamedTuple):
    """Questions with their answers, of any number of tokens."""

    prompts: list[np.ndarray]  # each (length,) int32
    answers: Sequence[Any] | np.ndarray  # of each a token, or tokens (n,)
    end: int  # the token that ends an answer
    num_symbols: int  # of the tokenizer; a model may have more logits
    # Of the new tokens (n,), without the end, and the answer; 0 to 1.
    score: Callable[[np.ndarray, Any], float] = ends_with


class Dataset(NamedTuple):
    """One token stream a split, the tokenizer they were made with, and prompts by name."""

    train: Stream
    validation: Stream
    tokenizer: Tokenizer
    prompts: Mapping[str, Prompts]
    fingerprint: str  # names the content; a run keeps it


Loader = Callable[[Mapping[str, Any]], Dataset]
DATASETS: Registry[Loader] = Registry("data set")
GIVEN = "given"  # the name, in a record, of a data set that was handed to `train`
OF_TEXT = ("shakespeare", *_corpora.CORPORA)  # those that `data.tokenizer` reads


def dataset(name: str) -> Callable[[Loader], Loader]:
    """Registers a function `(config.data) -> Dataset`, a choice of `config.data.name`.

    Its keyword-only parameters are `config.data.options`.
    """
    return DATASETS.register(name, lambda load: load)


def load_dataset(data: Mapping[str, Any], dataset: Dataset | None = None) -> Dataset:
    """Prepares the data set that `config.data` describes (once) and reads it.

    Args:
      data: `config.data`.
      dataset: taken instead, with `train_fraction` of its training split.

    Raises:
      UserError: it cannot be downloaded, read or split; the message says what to do.
    """
    dataset = dataset or _load(data)
    count = round(data["train_fraction"] * len(dataset.train))
    return dataset._replace(train=dataset.train.first(count))


def _load(data: Mapping[str, Any]) -> Dataset:
    if data["name"].startswith(_catalogue.PREFIX):
        return _load_of_catalogue(data)
    return DATASETS.configured(data["name"], data["options"])(data)


def load_recorded(data: Mapping[str, Any]) -> Dataset:
    """The data set that a run was trained on, by the fingerprint in its configuration.

    Raises:
      UserError: the run has none, it is another one by now, or cannot be read.
    """
    if not data["fingerprint"]:
        raise UserError(
            f"the run was converted without its corpus ({data['name']}); convert it again with "
            "--path=CORPUS to use it"
        )
    dataset = load_dataset(data)
    if dataset.fingerprint != data["fingerprint"]:
        raise UserError(f"the data set {data['name']} is no longer the one of this run")
    return dataset


def _load_of_catalogue(data: Mapping[str, Any]) -> Dataset:
    place = _catalogue.documents(data["name"].removeprefix(_catalogue.PREFIX), data["field"])
    return _load_corpus({**data, "name": "text", "path": str(place)})


def reads_text(name: str) -> bool:
    """Whether a data set is text, which `config.data.tokenizer` reads."""
    return name in OF_TEXT or name.startswith(_catalogue.PREFIX)


def _load_corpus(data: Mapping[str, Any]) -> Dataset:
    result = _corpora.load(data)
    return Dataset(result.train, result.validation, result.tokenizer, {}, result.fingerprint)


def _load_listops(data: Mapping[str, Any]) -> Dataset:
    settings = data["listops"]
    builder = _listops.listops(settings).prepare()
    tokenizer = _listops.tokenizer(settings)
    records = [record["tokens"].astype(np.int32) for record in builder.records("train")]
    tokens = np.concatenate(records)
    weights = np.ones(len(tokens), np.float32)
    if not settings["learn_questions"]:
        step, _ = tokenizer.encode(f"{_listops.STEP},{EOS}")
        solved = [np.cumsum(record == step) > (record == step) for record in records]
        weights = np.concatenate(solved).astype(np.float32)
    num_train = int(len(tokens) * (1.0 - data["validation_fraction"]))
    split = lambda *bounds: Stream.of(tokens[slice(*bounds)], weights[slice(*bounds)])
    train, validation = split(None, num_train), split(num_train, None)
    names = ["", *(f"_{operation}" for operation in settings["operations"])]
    prompts = {"listops" + n: _prompts(builder.records("test" + n), tokenizer) for n in names}
    return Dataset(train, validation, tokenizer, prompts, builder.fingerprint)


def _prompts(records, tokenizer: Tokenizer) -> Prompts:
    """The prompt of a worked expression ends with its first `=`."""
    step, end = tokenizer.encode(f"{_listops.STEP},{EOS}")
    prompts, answers = [], []
    for record in records:
        tokens = record["tokens"].astype(np.int32)
        prompts.append(tokens[: np.argmax(tokens == step) + 1])
        answers.append(int(record["answer"]))
    return Prompts(prompts, np.array(answers, dtype=np.int32), int(end), tokenizer.size)


def _load_given(data: Mapping[str, Any]) -> Dataset:
    raise UserError(
        "data.name=given is not possible: it stands for a data set that was handed to "
        "nrgpt_jax.train(dataset=...); hand it over again, or register it by @nrgpt.dataset"
    )


DATASETS.add(GIVEN, _load_given)
DATASETS.add("listops", _load_listops)
for _name in OF_TEXT:
    DATASETS.add(_name, _load_corpus)
