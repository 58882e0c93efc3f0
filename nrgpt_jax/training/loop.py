"""Training from a configuration: what is checked, prepared and locked before the first step."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import jax
import optax
from ml_collections import ConfigDict

from nrgpt_jax import paths, plugins
from nrgpt_jax.datasets import GIVEN, Dataset, load_dataset
from nrgpt_jax.datasets.files import absolute
from nrgpt_jax.datasets.pipeline import check_length
from nrgpt_jax.datasets.tokenizers import check_recordable
from nrgpt_jax.errors import UserError
from nrgpt_jax.processes import host0_first, one_ahead, raise_on_all_hosts
from nrgpt_jax.runs.directory import check_run, described_parts, locked
from nrgpt_jax.training.config_checks import check_config, check_mesh
from nrgpt_jax.training.hosts import check_same, check_shared
from nrgpt_jax.training.run_directory import RunDirectory
from nrgpt_jax.training.step_log import Hook
from nrgpt_jax.training.stop import Stop
from nrgpt_jax.training.trainer import Trainer


def train(
    config: ConfigDict,
    workdir: Path | str,
    *,
    dataset: Dataset | None = None,
    optimizer: optax.GradientTransformation | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Trains until `config.train_steps`, resuming from the latest checkpoint if there is one.

    With several processes (`host.join`) all of them call it, with the same arguments.

    Args:
      config: as of `default_config`.
      workdir: the run directory: a folder, or gs://BUCKET/FOLDER.
      dataset: None: the one that `config.data` names. Resume with the same.
      optimizer: None: the one that `config.optimizer` describes; else of that only
        `accumulation_steps` and the learning rate that is logged are read. Resume with the same.
      hooks: called whenever metrics are logged, as `step_log.Hook`.

    Returns:
      The metrics of the last evaluation (empty if none was reached).

    Raises:
      UserError: the configuration, the data or the run directory do not allow it, on any host;
        or the run has diverged.
      OSError: something cannot be written (what was saved before is whole), or the run directory
        was removed.
      SystemExit: a signal has stopped it, after it was saved; the code is 128 + the signal.
    """
    workdir = paths.as_path(workdir)
    config = config.copy_and_resolve_references()
    if dataset is not None:
        config.data.name = GIVEN
    if optimizer is not None:
        config.optimizer.name = GIVEN
    raise_on_all_hosts(lambda: check_config(config, jax.device_count()))
    data = one_ahead(lambda: resolve(config, dataset))  # what it prepares, the others find
    check_same(config.to_dict())
    changes = raise_on_all_hosts(lambda: check_run(workdir, config, data.tokenizer))
    with contextlib.ExitStack() as resources:
        lock = host0_first(lambda: resources.enter_context(locked(workdir)))
        check_shared(workdir)
        stop = resources.enter_context(Stop())
        run = RunDirectory(workdir, config, data.tokenizer, changes, lock)
        trainer = Trainer(config, run, data, stop, optimizer, hooks)
        result = trainer.run()
    if not trainer.done():
        raise SystemExit(stop.exit_code)
    return result


def resolve(config: ConfigDict, dataset: Dataset | None = None) -> Dataset:
    """The data set, with what depends on it set in the configuration and checked."""
    dataset = load_dataset(config.data, dataset)
    check_recordable(dataset.tokenizer)
    plugins.check_importable(described_parts(config))
    check_length(dataset.train, config.model.context_length, "train")
    check_length(dataset.validation, config.model.context_length, "validation")
    set_vocabulary_size(config, dataset)
    check_mesh(config, jax.device_count())
    config.data.fingerprint = dataset.fingerprint
    if config.data.path:  # the run can be evaluated from anywhere
        config.data.path = absolute(config.data.path)
    kind, _, place = config.data.tokenizer.partition(":")
    if place and Path(place).is_file():
        config.data.tokenizer = f"{kind}:{absolute(place)}"
    return dataset


def set_vocabulary_size(config: ConfigDict, dataset: Dataset) -> None:
    """Resolves `model.vocab_size`: 0 is the tokenizer's, more is padding, less an error."""
    size = dataset.tokenizer.size
    if 0 < config.model.vocab_size < size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small: the corpus has {size} "
            "symbols; use 0 or a larger size"
        )
    config.model.vocab_size = config.model.vocab_size or size
