"""Data sets by name: token streams for training and validation, prompts for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nrgpt_jax.datasets import listops as _listops
from nrgpt_jax.datasets import text as _text
from nrgpt_jax.datasets.tokenizers import EOS, FIXED, CharTokenizer, Tokenizer
from nrgpt_jax.errors import UserError


class Prompts(NamedTuple):
    """Questions with one-token answers."""

    prompts: list[np.ndarray]  # each (length,) int32
    answers: np.ndarray  # (count,) int32
    end: int  # the token that ends an answer


class Stream(NamedTuple):
    """A split: its tokens in order, and whether each is to be predicted."""

    tokens: np.ndarray  # (tokens,) int32
    weights: np.ndarray  # (tokens,) float32: the weight of predicting this token, 0 or 1

    @classmethod
    def of(cls, tokens: np.ndarray) -> "Stream":
        """A stream in which every token counts."""
        return cls(tokens, np.ones(len(tokens), np.float32))

    def __len__(self) -> int:
        return len(self.tokens)


class Dataset(NamedTuple):
    """One token stream a split, the tokenizer they were made with, and prompts by name."""

    train: Stream
    validation: Stream
    tokenizer: Tokenizer
    prompts: Mapping[str, Prompts]
    fingerprint: str  # names the content; a run keeps it


def load_dataset(data: Mapping[str, Any]) -> Dataset:
    """Prepares the data set that `config.data` describes (once) and reads it.

    Raises:
      UserError: it cannot be downloaded, read or split; the message says what to do.
    """
    return DATASETS[data["name"]](data)


def load_recorded(data: Mapping[str, Any]) -> Dataset:
    """The data set that a run was trained on, by the fingerprint in its configuration.

    Raises:
      UserError: it is another one by now, or cannot be read.
    """
    dataset = load_dataset(data)
    if dataset.fingerprint != data["fingerprint"]:
        raise UserError(f"the data set {data['name']} is no longer the one of this run")
    return dataset


def _load_text(builder_of: Callable) -> Callable[[Mapping[str, Any]], Dataset]:
    def load(data: Mapping[str, Any]) -> Dataset:
        builder = builder_of(data).prepare()
        train, validation = builder.text("train"), builder.text("validation")
        if data["tokenizer"] in FIXED:
            tokenizer: Tokenizer = FIXED[data["tokenizer"]]()
        else:
            tokenizer = CharTokenizer(set(train) | set(validation))
        stream = lambda text: Stream.of(tokenizer.encode(text))
        return Dataset(stream(train), stream(validation), tokenizer, {}, builder.fingerprint)

    return load


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
    split = lambda *bounds: Stream(tokens[slice(*bounds)], weights[slice(*bounds)])
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
    return Prompts(prompts, np.array(answers, dtype=np.int32), int(end))


DATASETS: Mapping[str, Callable[[Mapping[str, Any]], Dataset]] = {
    "listops": _load_listops,
    "shakespeare": _load_text(_text.shakespeare),
    "text": _load_text(_text.text),
}
