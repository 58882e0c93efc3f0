"""Data sets by name: token streams for training and validation, prompts for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nrgpt_jax.datasets import catalogue as _catalogue
from nrgpt_jax.datasets import corpora as _corpora
from nrgpt_jax.datasets import listops as _listops
from nrgpt_jax.datasets import reasoning as _reasoning
from nrgpt_jax.datasets import shards as _shards
from nrgpt_jax.datasets.streams import Dataset, Prompts, Stream
from nrgpt_jax.datasets.tokenizers import EOS
from nrgpt_jax.errors import UserError
from nrgpt_jax.registry import Registry

Loader = Callable[[Mapping[str, Any]], Dataset]
DATASETS: Registry[Loader] = Registry("data set")
GIVEN = "given"  # recorded name of a data set that was passed to `train`
OF_TEXT = ("shakespeare", *_corpora.CORPORA)  # text, tokenized by `data.tokenizer`


def dataset(name: str) -> Callable[[Loader], Loader]:
    """Register a loader `(config.data) -> Dataset` as a choice of `config.data.name`.

    The loader's keyword-only parameters are set by `config.data.options`.
    """
    return DATASETS.register(name, lambda load: load)


def load_dataset(data: Mapping[str, Any], dataset: Dataset | None = None) -> Dataset:
    """Open the data set of `config.data`, with its first `train_fraction` for training.

    Args:
      data: `config.data`; its tokens are prepared on first use.
      dataset: used instead of the one that `data.name` names.

    Raises:
      UserError: it cannot be downloaded, read or split; the message says what to do.
    """
    dataset = dataset or _load(data)
    count = round(data["train_fraction"] * len(dataset.train))
    return dataset._replace(train=dataset.train.first(count))


def _load(data: Mapping[str, Any]) -> Dataset:
    name = data["name"]
    if name.startswith(_catalogue.PREFIX):
        place = _catalogue.documents(name.removeprefix(_catalogue.PREFIX), data["field"])
        return _corpora.load({**data, "name": "text", "path": str(place)})
    return DATASETS.configured(name, data["options"])(data)


def load_recorded(data: Mapping[str, Any]) -> Dataset:
    """Open the data set that a run was trained on, and compare it with the recorded fingerprint.

    Raises:
      UserError: the run has no fingerprint, the data set has changed, or it cannot be read.
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


def reads_text(name: str) -> bool:
    """Return whether a data set is text, tokenized by `config.data.tokenizer`."""
    return name in OF_TEXT or name.startswith(_catalogue.PREFIX)


def _load_listops(data: Mapping[str, Any]) -> Dataset:
    settings = data["listops"]
    tokenizer = _listops.tokenizer(settings)
    step, end = tokenizer.encode(f"{_listops.STEP},{EOS}")
    metadata = _shards.read_metadata(_listops.prepare(settings))

    def samples(split: str) -> list[np.ndarray]:
        tokens = _shards.stream_of(metadata, split).tokens
        return np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]

    records = samples("train")
    tokens = np.concatenate(records)
    weights = np.ones(len(tokens), np.float32)
    if not settings["learn_questions"]:
        solved = [np.cumsum(record == step) > (record == step) for record in records]
        weights = np.concatenate(solved).astype(np.float32)
    num_train = int(len(tokens) * (1.0 - data["validation_fraction"]))
    split = lambda *bounds: Stream.of(tokens[slice(*bounds)], weights[slice(*bounds)])
    train, validation = split(None, num_train), split(num_train, None)
    prompts = {}
    for name in ("", *(f"_{operation}" for operation in settings["operations"])):
        tests = samples("test" + name)
        questions = [test[: np.argmax(test == step) + 1] for test in tests]
        answers = np.array([test[-2] for test in tests], np.int32)
        prompts["listops" + name] = Prompts(questions, answers, int(end), tokenizer.size)
    return Dataset(train, validation, tokenizer, prompts, metadata["fingerprint"])


def _load_given(data: Mapping[str, Any]) -> Dataset:
    raise UserError(
        "data.name=given is not possible: it stands for a data set that was handed to "
        "nrgpt_jax.train(dataset=...); hand it over again, or register it by @nrgpt.dataset"
    )


DATASETS.add(GIVEN, _load_given)
DATASETS.add("listops", _load_listops)
for _name in _reasoning.TASKS:
    dataset(_name)(_reasoning.load)
for _name in OF_TEXT:
    DATASETS.add(_name, _corpora.load)
