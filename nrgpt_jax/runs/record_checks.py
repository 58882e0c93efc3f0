"""Checks that the recorded files of a run are valid and consistent."""

from pathlib import Path

from ml_collections import ConfigDict

from nrgpt_jax.datasets import listops, reads_text
from nrgpt_jax.datasets.corpora import kind_of
from nrgpt_jax.datasets.data_checks import check_data
from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.models.model_checks import check_model


def check_recorded(path: Path, config: ConfigDict, cure: str) -> None:
    """Check the model and the data of a configuration that was read from a file.

    Args:
      path: the file.
      config: the configuration in the file.
      cure: the advice for a damaged file, at the end of the message.

    Raises:
      UserError: the message names the file, the field, its value and the allowed values.
    """
    try:
        check_model(config.model.to_dict())
        check_data(config.data.to_dict())
    except UserError as error:
        raise UserError(f"{path}: {error}; {cure}") from None


def check_tokenizer(workdir: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizer of a run does not match its configuration."""
    size, known, data = tokenizer.size, config.model.vocab_size, config.data
    reason = ""
    if size > known:
        reason = f"it has {size:,} symbols, and the model {known:,}"
    elif reads_text(data.name) and tokenizer.kind != kind_of(data.tokenizer):
        reason = f"it is of kind {tokenizer.kind}, and data.tokenizer is {data.tokenizer}"
    elif data.name == "listops" and _is_permuted(tokenizer, listops.tokenizer(data.listops)):
        reason = "its symbols stand in another order than those of ListOps"
    if reason:
        raise UserError(
            f"the tokenizer of {workdir} is not the one of its model: {reason}; restore both files "
            "from a copy"
        )


def _is_permuted(one: Tokenizer, other: Tokenizer) -> bool:
    there, here = one.vocabulary, other.vocabulary
    return there != here and sorted(there) == sorted(here)
