"""Checks of `config.data`: every mistake is one line, raised before anything is read."""

from collections.abc import Mapping
from typing import Any

from nrgpt_jax.configs import check_at_most, check_finite
from nrgpt_jax.datasets import DATASETS, catalogue
from nrgpt_jax.datasets.corpora import CORPORA
from nrgpt_jax.datasets.hf_tokenizer import PREFIX
from nrgpt_jax.datasets.listops import OPERATIONS
from nrgpt_jax.datasets.tokenizers import FIXED
from nrgpt_jax.errors import require, require_choice, require_not_negative, require_positive
from nrgpt_jax.registry import check_options

LARGEST_SEED = 2**32 - 1  # JAX takes larger ones for others: 2**32 is 0
_LARGEST_BATCH = 2**24
_LARGEST = {
    "modulus": 2**12,
    "depth": 2**6,
    "max_arguments": 2**6,
    "num_train": 10**9,
    "num_test": 10**7,
    "seed": LARGEST_SEED,
}
_MOST_TUPLES = 10**7  # that are held out, in memory
_MOST_ARGUMENTS = 10**3  # of an expression and all inside it, on average


def check_data(data: Mapping[str, Any]) -> None:
    """Checks `config.data`. Raises UserError naming field, value and what is allowed."""
    if not data["name"].startswith(catalogue.PREFIX):
        require_choice("data.name", data["name"], [*DATASETS, "tfds:NAME"])
    of_documents = data["name"] in CORPORA and data["name"] != "text"
    kinds = [*([] if of_documents else ["char"]), *FIXED]
    if not data["tokenizer"].startswith(PREFIX):
        require_choice("data.tokenizer", data["tokenizer"], [*kinds, "hf:NAME_OR_FILE"])
    check_options("data.options", data["options"], DATASETS.options.get(data["name"], {}))
    validation, train = data["validation_fraction"], data["train_fraction"]
    require(0 < validation < 1, "data.validation_fraction", validation, "0 < fraction < 1")
    require(0 < train <= 1, "data.train_fraction", train, "0 < fraction <= 1")
    require_positive(data, "data.", "batch_size")
    check_at_most(data, "data.", {"batch_size": _LARGEST_BATCH})
    require("\0" not in data["path"], "data.path", data["path"], "a path without the character 0")
    if data["name"] == "listops":
        _check_listops(data["listops"])


def _check_listops(listops: Mapping[str, Any]) -> None:
    prefix = "data.listops."
    require(len(listops["operations"]) > 0, prefix + "operations", (), "name at least one")
    for operation in listops["operations"]:
        require_choice(prefix + "operations", operation, tuple(OPERATIONS))
    require_positive(listops, prefix, "depth", "min_arguments", "num_train", "num_test")
    require_not_negative(listops, prefix, "seed")
    check_finite(listops, prefix)
    check_at_most(listops, prefix, _LARGEST)
    require(listops["modulus"] > 1, prefix + "modulus", listops["modulus"], "at least 2")
    least, most = listops["min_arguments"], listops["max_arguments"]
    require(most >= least, prefix + "max_arguments", most, f"at least min_arguments={least}")
    for field in ("function_probability", "exclusion_rate"):
        require(0 <= listops[field] <= 1, prefix + field, listops[field], "between 0 and 1")
    rate = listops["exclusion_rate"]
    tuples = int(listops["modulus"] ** most * rate)
    require(tuples > 0, prefix + "exclusion_rate", rate, "it must hold out one tuple at least")
    allowed = f"it would hold out {tuples:,} tuples; at most {_MOST_TUPLES:,}"
    require(tuples <= _MOST_TUPLES, prefix + "exclusion_rate", rate, allowed)
    # expressions must not grow without bound, by operations inside operations
    mean, inside = (least + most) / 2, (least + most) / 2 * listops["function_probability"]
    arguments = sum(mean * inside**depth for depth in range(listops["depth"]))
    allowed = f"expressions would have {arguments:,.0f} arguments; at most {_MOST_ARGUMENTS:,}"
    require(arguments <= _MOST_ARGUMENTS, prefix + "depth", listops["depth"], allowed)
