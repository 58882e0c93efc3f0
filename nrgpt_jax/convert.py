"""Convert a checkpoint of the paper's PyTorch release to a run directory.

    python -m nrgpt_jax.convert --release=CKPT.pt --workdir=DIR
        [--data=shakespeare] [--path=CORPUS] [--model=NRGPT_H_FF2W] [--num_steps=5]

`sample` and `evaluate` accept the result. Text checkpoints of the release contain their settings;
its ListOps checkpoints contain only parameters, and need --data, --model and --num_steps. Without
--path, an OpenWebText checkpoint is converted without its corpus, which `evaluate` needs.
Needs PyTorch: pip install 'nrgpt-jax[torch]'.
"""

import math
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli, paths
from nrgpt_jax.credentials import check_no_credentials
from nrgpt_jax.datasets import DATASETS, load_dataset
from nrgpt_jax.datasets.data_checks import check_data
from nrgpt_jax.datasets.files import absolute
from nrgpt_jax.datasets.tokenizers import FIXED, Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.models.model_checks import check_model
from nrgpt_jax.runs import release as interop
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import CONFIG_FILE, record_run

_DATA_OF_RELEASE = {"shakespeare_char": "shakespeare", "openwebtext": "openwebtext"}
_PREFIXES = re.compile(r"^((_orig_mod|module)\.)+")  # from torch.compile and data parallelism
_PADDING = 128  # a byte-pair vocabulary is padded by fewer symbols than this


def convert(
    release: Path | str,
    workdir: Path | str,
    *,
    data: str | None = None,
    path: str | None = None,
    model: str | None = None,
    num_steps: int | None = None,
) -> None:
    """Convert a checkpoint of the release and write the run directory.

    Args:
      release: a `.pt` file of the release.
      workdir: the run directory to create.
      data: the training data set, whose vocabulary the run records.
      path: path of the corpus; optional for OpenWebText.
      model: name of the model, if the file does not contain it.
      num_steps: number of recurrent steps, if the file does not contain it.

    Raises:
      UserError: the file is unreadable or invalid, or a required setting is missing.
    """
    workdir = paths.as_path(workdir)
    if (workdir / CONFIG_FILE).exists():
        raise UserError(f"{workdir} holds a run already; name another --workdir")
    checkpoint = _load(Path(release))
    described, arguments = _table(checkpoint, "config"), _table(checkpoint, "model_args")
    name = model or _text(described, "model_path").rpartition(".")[2]
    steps = num_steps or _count(arguments, "n_layer")
    corpus = data or _DATA_OF_RELEASE.get(_text(described, "dataset"), "")
    for flag, value in (("model", name), ("num_steps", steps), ("data", corpus)):
        if not value:
            raise UserError(f"{release} does not say its {flag}; give --{flag}=...")
    state_dict = _parameters(_table(checkpoint, "model") or checkpoint, release)
    step, loss = _count(checkpoint, "iter_num"), _loss(checkpoint)
    meta = describe(state_dict, name, steps)
    config = interop.release_config(meta)
    config.experiment = "release"
    check_model(config.model.to_dict())
    _, variables = interop.from_release(state_dict, meta)
    tokenizer = _set_data(config, corpus, path)
    record_run(workdir, config, tokenizer)
    with Checkpoints(workdir, writable=True) as checkpoints:
        checkpoints.save_best(step, variables["params"], loss)


def _set_data(config: ConfigDict, corpus: str, path: str | None) -> Tokenizer:
    """Set the data set and its fingerprint in the configuration; return its tokenizer."""
    config.data.name, config.data.path = corpus, absolute(path) if path else ""
    if corpus == "openwebtext":
        config.data.update({"tokenizer": "gpt2", "validation_fraction": 0.0005})
    check_no_credentials(config)
    check_data(config.data.to_dict())
    if corpus == "openwebtext" and not path:
        tokenizer: Tokenizer = FIXED["gpt2"]()
    else:
        dataset = load_dataset(config.data)
        tokenizer, config.data.fingerprint = dataset.tokenizer, dataset.fingerprint
    size, wanted = tokenizer.size, config.model.vocab_size
    if size > wanted or (tokenizer.kind == "gpt2" and wanted - size >= _PADDING):
        raise UserError(
            f"{corpus} has {size} symbols, the checkpoint {wanted}: it was trained on other data; "
            "give --data=..."
        )
    return tokenizer


def _table(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = checkpoint.get(name, {})
    if not isinstance(table, Mapping):
        raise UserError(
            f"the checkpoint's {name} is a {type(table).__name__}; is it of the release?"
        )
    return table


def _text(table: Mapping[str, Any], name: str) -> str:
    """Return a string entry; "" if it is missing or not a string."""
    value = table.get(name)
    return value if isinstance(value, str) else ""


def _count(table: Mapping[str, Any], name: str) -> int:
    """Return a number of steps; 0 if it is missing or None."""
    value = table.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise UserError(f"the checkpoint's {name} is {_shown(value)}; is it of the release?")
    return value


def _loss(checkpoint: Mapping[str, Any]) -> float:
    """Return the validation loss of a checkpoint; NaN if it has none."""
    value = checkpoint.get("best_val_loss")
    try:
        loss = math.nan if value is None else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        loss = -1.0
    if loss < 0 or isinstance(value, (bool, str, bytes)):
        raise UserError(f"the checkpoint's best_val_loss is {_shown(value)}; is it of the release?")
    return loss


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


def _parameters(tensors: Mapping[str, Any], release: Path | str) -> dict[str, np.ndarray]:
    """Return the parameters as numpy arrays, without the prefixes of their names."""
    import torch

    result = {}
    for name, tensor in tensors.items():
        known = isinstance(tensor, torch.Tensor) and not (tensor.is_sparse or tensor.is_complex())
        if not known or not isinstance(name, str):
            kind = type(tensor).__name__
            raise UserError(
                f"{release} holds a {kind} as parameter {_shown(name)}; is it of the release?"
            )
        result[_PREFIXES.sub("", name)] = array = tensor.float().numpy()
        if not np.isfinite(array).all():
            raise UserError(f"{release}: parameter {name} is not finite; take another checkpoint")
    return result


def describe(state_dict: interop.StateDict, name: str, num_steps: int) -> dict[str, Any]:
    """Infer the `meta` of `interop.from_release` from the shapes of the parameters."""

    def shape(parameter: str, rank: int) -> tuple[int, ...]:
        if parameter not in state_dict:
            raise UserError(f"the checkpoint has no parameter {parameter}; is it of the release?")
        result = state_dict[parameter].shape
        if len(result) != rank or 0 in result:
            raise UserError(f"parameter {parameter} has shape {result}; is it of the release?")
        return result

    vocab_size, width = shape("token_embedding_table.weight", 2)
    heads = {m[1] for k in state_dict if (m := re.search(r"\.heads\.(\d+)\.", k))}
    if not heads:
        raise UserError("the checkpoint has no attention heads; is it of the release?")
    layers = [k for k in state_dict if re.search(r"ffwd\.net\.\d\.weight", k)]
    if not layers:
        raise UserError("the checkpoint has no feed-forward layer; is it of the release?")
    hidden = max(shape(layer, 2)[0] for layer in layers)
    masks = [w for k, w in state_dict.items() if k.startswith("blocks.attn") and k.endswith("tril")]
    return {
        "model": name,
        "n_embed": width,
        "n_head": len(heads),
        "n_layer": num_steps,
        "block_size": shape("position_embedding_table.weight", 2)[0],
        "vocab_size": vocab_size,
        "strictly_causal": bool(masks) and bool(masks[0].flat[:1] == 0),
        "ff_hid_factor": hidden // width,
    }


def _is_archive(path: Path) -> bool:
    """Return whether a file is a torch zip archive. Raises UserError if it is truncated."""
    is_archive = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and not is_archive:
            raise UserError(f"{path} is cut short; copy or download it again")
    return is_archive


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch is missing: pip install 'nrgpt-jax[torch]'") from None
    try:
        archive = _is_archive(path)  # memory-mapped: the optimizer state is never read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch raises many types for damaged or foreign files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no PyTorch checkpoint: {reason}") from None
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds no parameters but a {type(checkpoint).__name__}")
    return checkpoint


if __name__ == "__main__":
    _workdir = cli.define_workdir_flag()
    _release = flags.DEFINE_string(
        "release", None, "Checkpoint (.pt) of the release.", required=True
    )
    _data = flags.DEFINE_enum("data", None, tuple(DATASETS), "Data set it was trained on.")
    _path = flags.DEFINE_string("path", None, "Where that data set is, if it is elsewhere.")
    _model = flags.DEFINE_string("model", None, "Name of the model.")
    _steps = flags.DEFINE_integer("num_steps", None, "Recurrent steps.", lower_bound=1)

    def main() -> None:
        """Convert, and print the run directory."""
        convert(
            _release.value,
            _workdir.value,
            data=_data.value,
            path=_path.value,
            model=_model.value,
            num_steps=_steps.value,
        )
        print(f"wrote {_workdir.value}", file=sys.stderr)

    cli.run(main)
