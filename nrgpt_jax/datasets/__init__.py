"""Data sets by name: token streams for training and validation, prompts for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nrgpt_jax.datasets import listops as _listops
from nrgpt_jax.datasets import text as _text
from nrgpt_jax.datasets.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer


class Prompts(NamedTuple):
    """Questions with one-token answers."""

    prompts: list[np.ndarray]  # each (length,) int32
    answers: np.ndarray  # (count,) int32
    end: int  # the token that ends an answer


class Dataset(NamedTuple):
    """One token stream a split, the tokenizer they were made with, and prompts by name."""

    train: np.ndarray  # (tokens,) int32
    validation: np.ndarray  # (tokens,) int32
    tokenizer: Tokenizer
    prompts: Mapping[str, Prompts]


def load_dataset(data: Mapping[str, Any]) -> Dataset:
    """Prepares the data set that `config.data` describes (once) and reads it.

    Raises:
      UserError: it cannot be downloaded, read or split; the message says what to do.
    """
    return DATASETS[data["name"]](data)


def _load_text(builder_of: Callable) -> Callable[[Mapping[str, Any]], Dataset]:
    def load(data: Mapping[str, Any]) -> Dataset:
        builder = builder_of(data).prepare()
        train, validation = builder.text("train"), builder.text("validation")
        if data["tokenizer"] == "byte":
            tokenizer: Tokenizer = ByteTokenizer()
        else:
            tokenizer = CharTokenizer(set(train) | set(validation))
        return Dataset(tokenizer.encode(train), tokenizer.encode(validation), tokenizer, {})

    return load


def _load_listops(data: Mapping[str, Any]) -> Dataset:
    settings = data["listops"]
    builder = _listops.listops(settings).prepare()
    tokenizer = _listops.tokenizer(settings)
    stream = np.concatenate([r["tokens"] for r in builder.records("train")]).astype(np.int32)
    num_train = int(len(stream) * (1.0 - data["validation_fraction"]))
    names = ["", *(f"_{operation}" for operation in settings["operations"])]
    prompts = {"listops" + n: _prompts(builder.records("test" + n), tokenizer) for n in names}
    return Dataset(stream[:num_train], stream[num_train:], tokenizer, prompts)


def _prompts(records, tokenizer: Tokenizer) -> Prompts:
    """The prompt of a worked expression ends with its first `=`."""
    step, end = tokenizer.encode(f"{_listops.STEP},{_listops.EOS}")
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
