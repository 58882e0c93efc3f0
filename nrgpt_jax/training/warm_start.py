"""Initial parameters from a trained model, instead of random ones."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from nrgpt_jax import paths
from nrgpt_jax.datasets.tokenizers import Tokenizer, as_record
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import LanguageModel, abstract_params
from nrgpt_jax.processes import raise_on_all_hosts
from nrgpt_jax.runs.directory import CONFIG_FILE
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE, load_pretrained


def folder_of(init_from: str, seed: int | str, workdir: Path) -> Path:
    """Return the folder of the trained model; {seed} and {workdir} in it are those of the run."""
    return paths.as_path(init_from.replace("{seed}", str(seed)).replace("{workdir}", str(workdir)))


def initial_params(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> Any:
    """Load the parameters of a trained model as numpy arrays; all processes must call it.

    Args:
      folder: a run directory, whose best checkpoint is used, or an exported folder.
      model: the model to train, with the same names and shapes of parameters.
      tokenizer: the tokenizer of the data, with the same symbols.

    Raises:
      UserError: the trained model is missing on some host, or does not match.
    """
    raise_on_all_hosts(lambda: _check_there(folder))  # before all processes read it together
    source = load_pretrained(folder)
    if as_record(source.tokenizer) != as_record(tokenizer):
        raise UserError(
            f"init_from={folder} knows other symbols than the data of this run; take the same "
            "config.data, or data.tokenizer=byte or gpt2 for both"
        )
    wanted, theirs = _shapes(abstract_params(model)), _shapes(source.variables["params"])
    for name in sorted(wanted.keys() | theirs.keys()):
        if wanted.get(name) != theirs.get(name):
            shape = lambda shapes, name=name: shapes.get(name, "none")
            raise UserError(
                f"init_from={folder} is another model: its {name} is {shape(theirs)}, that of this "
                f"configuration {shape(wanted)}; take the fields of its config.json in model"
            )
    return jax.tree.map(np.asarray, source.variables["params"])


def _check_there(folder: Path) -> None:
    trained = (folder / "checkpoints/best").is_dir() or (folder / WEIGHTS_FILE).exists()
    if not trained or not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"init_from={folder} is no trained model; train it first, or name another run or folder"
        )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {k: leaf.shape for k, leaf in traverse_util.flatten_dict(params, sep="/").items()}
