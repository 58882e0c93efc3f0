"""Checks of `config.data`, before any data is read; every error message is one line."""

from collections.abc import Mapping
from typing import Any

from nrgpt_jax.datasets import DATASETS, catalogue
from nrgpt_jax.datasets.corpora import CORPORA
from nrgpt_jax.datasets.hf_tokenizer import PREFIX
from nrgpt_jax.datasets.listops import OPERATIONS
from nrgpt_jax.datasets.tokenizers import FIXED
from nrgpt_jax.errors import require, require_choice
from nrgpt_jax.limits import check_limits
from nrgpt_jax.registry import check_options

_MOST_TUPLES = 10**7  # held-out tuples, in memory
_MOST_ARGUMENTS = 10**3  # mean number of arguments of an expression, including nested ones


def check_data(data: Mapping[str, Any]) -> None:
    """Check `config.data`. Raises UserError naming the field, its value and the allowed values."""
    if not data["name"].startswith(catalogue.PREFIX):
        require_choice("data.name", data["name"], [*DATASETS, "tfds:NAME"])
    of_documents = data["name"] in CORPORA and data["name"] != "text"
    kinds = [*([] if of_documents else ["char"]), *FIXED]
    if not data["tokenizer"].startswith(PREFIX):
        require_choice("data.tokenizer", data["tokenizer"], [*kinds, "hf:NAME_OR_FILE"])
    check_options("data.options", data["options"], DATASETS.options.get(data["name"], {}))
    check_limits({name: data[name] for name in data if name != "listops"}, "data")
    require("\0" not in data["path"], "data.path", data["path"], "a path without the character 0")
    if data["name"] == "listops":
        _check_listops(data["listops"])


def _check_listops(listops: Mapping[str, Any]) -> None:
    prefix = "data.listops."
    require(len(listops["operations"]) > 0, prefix + "operations", (), "name at least one")
    for operation in listops["operations"]:
        require_choice(prefix + "operations", operation, tuple(OPERATIONS))
    check_limits(listops, "data.listops")
    least, most = listops["min_arguments"], listops["max_arguments"]
    require(most >= least, prefix + "max_arguments", most, f"at least min_arguments={least}")
    rate = listops["exclusion_rate"]
    tuples = int(listops["modulus"] ** most * rate)
    require(tuples > 0, prefix + "exclusion_rate", rate, "it must hold out one tuple at least")
    allowed = f"it would hold out {tuples:,} tuples; at most {_MOST_TUPLES:,}"
    require(tuples <= _MOST_TUPLES, prefix + "exclusion_rate", rate, allowed)
    # nested operations must not make expressions grow without bound
    mean, inside = (least + most) / 2, (least + most) / 2 * listops["function_probability"]
    arguments = sum(mean * inside**depth for depth in range(listops["depth"]))
    allowed = f"expressions would have {arguments:,.0f} arguments; at most {_MOST_ARGUMENTS:,}"
    require(arguments <= _MOST_ARGUMENTS, prefix + "depth", listops["depth"], allowed)
