"""Training from a configuration: checks, data preparation and the lock before the first step."""

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
    """Train up to `config.train_steps`, resuming from the latest checkpoint if there is one.

    With several processes (`host.join`), all must call it with the same arguments.

    Args:
      config: a configuration of the form of `default_config`.
      workdir: the run directory: a folder, or gs://BUCKET/FOLDER.
      dataset: the data set; None: the one that `config.data` names. Resume with the same.
      optimizer: the optimizer; None: the one of `config.optimizer`. If given, `config.optimizer`
        only sets `accumulation_steps` and the logged learning rate. Resume with the same.
      hooks: functions called whenever metrics are logged, see `step_log.Hook`.

    Returns:
      The metrics of the last evaluation (empty if none was reached).

    Raises:
      UserError: the configuration, the data or the run directory is invalid on some host, or the
        run has diverged.
      OSError: a file cannot be written (earlier checkpoints remain valid), or the run directory
        was removed.
      SystemExit: a signal stopped the run after it was saved; the code is 128 + the signal.
    """
    workdir = paths.as_path(workdir)
    config = config.copy_and_resolve_references()
    if dataset is not None:
        config.data.name = GIVEN
    if optimizer is not None:
        config.optimizer.name = GIVEN
    raise_on_all_hosts(lambda: check_config(config, jax.device_count()))
    data = one_ahead(lambda: resolve(config, dataset))  # the other processes find the prepared data
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
    """Load the data set; set and check the configuration fields that depend on it."""
    dataset = load_dataset(config.data, dataset)
    check_recordable(dataset.tokenizer)
    plugins.check_importable(described_parts(config))
    check_length(dataset.train, config.model.context_length, "train")
    check_length(dataset.validation, config.model.context_length, "validation")
    set_vocabulary_size(config, dataset)
    check_mesh(config, jax.device_count())
    config.data.fingerprint = dataset.fingerprint
    if config.data.path:  # so that the run can be evaluated from any folder
        config.data.path = absolute(config.data.path)
    kind, _, place = config.data.tokenizer.partition(":")
    if place and Path(place).is_file():
        config.data.tokenizer = f"{kind}:{absolute(place)}"
    return dataset


def set_vocabulary_size(config: ConfigDict, dataset: Dataset) -> None:
    """Resolve `model.vocab_size`: 0 is the tokenizer's, more is padding, less an error."""
    size = dataset.tokenizer.size
    if 0 < config.model.vocab_size < size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small: the corpus has {size} "
            "symbols; use 0 or a larger size"
        )
    config.model.vocab_size = config.model.vocab_size or size
