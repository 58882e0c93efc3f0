"""The loop of training: steps, evaluations, checkpoints, a stop between two steps."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from nrgpt_jax.datasets import Dataset, load_dataset
from nrgpt_jax.datasets.files import absolute
from nrgpt_jax.datasets.pipeline import check_length, train_batches, validation_batches
from nrgpt_jax.errors import STOPPED, UserError
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import check_run, locked, record_run
from nrgpt_jax.runs.metrics import MetricWriter, SilentWriter, read_metrics
from nrgpt_jax.training import evaluation, optimizers
from nrgpt_jax.training import step as steps
from nrgpt_jax.training.config_checks import check_config, check_mesh
from nrgpt_jax.training.hosts import (
    Stop,
    agreed,
    by_first,
    check_same,
    check_shared,
    is_first,
    one_ahead,
    say,
)
from nrgpt_jax.training.step_log import StepLog, diverged


def train(config: ConfigDict, workdir: Path | str) -> dict[str, float]:
    """Trains until `config.train_steps`, going on from the latest checkpoint if there is one.

    With several processes (`host.join`) all of them call it, with the same arguments.

    Returns:
      The metrics of the last evaluation (empty if none was reached).

    Raises:
      UserError: the configuration, the data or the run directory do not allow it, on any host.
      SystemExit: SIGTERM has stopped it, after it was saved; whoever sent the signal sees by the
        exit code that it is to be started again.
    """
    workdir = Path(workdir)
    config = config.copy_and_resolve_references()
    agreed(lambda: check_config(config, jax.device_count()))
    dataset = one_ahead(lambda: _resolve(config))  # what it prepares, the others find
    check_same(config.to_dict())
    changes = agreed(lambda: check_run(workdir, config, dataset.tokenizer))
    with contextlib.ExitStack() as held:
        by_first(lambda: held.enter_context(locked(workdir)))
        check_shared(workdir)
        checkpoints = held.enter_context(Checkpoints(workdir, writable=True))
        trainer = Trainer(config, workdir, dataset, checkpoints)
        by_first(lambda: record_run(workdir, config, dataset.tokenizer))
        for change in changes:
            say(f"changed since this run was started: {change}")
        found = trainer.run()
    if trainer.terminated:
        raise SystemExit(STOPPED)
    return found


def _resolve(config: ConfigDict) -> Dataset:
    """The data set, with what depends on it set in the configuration and checked."""
    dataset = load_dataset(config.data)
    check_length(dataset.train, config.model.context_length, "train")
    check_length(dataset.validation, config.model.context_length, "validation")
    set_vocabulary_size(config, dataset)
    check_mesh(config, jax.device_count())
    config.data.fingerprint = dataset.fingerprint
    if config.data.path:  # the run can be evaluated from anywhere
        config.data.path = absolute(config.data.path)
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


class Trainer:
    """One run: its state, its data, and the loop over steps."""

    def __init__(
        self, config: ConfigDict, workdir: Path, dataset: Dataset, checkpoints: Checkpoints
    ):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.checkpoints = checkpoints
        self.mesh = sharding.make_mesh(config.mesh)
        self.model = create_model(config)
        self.schedule = optimizers.learning_rate_schedule(config.optimizer, config.train_steps)
        optimizer = optimizers.create_optimizer(
            config.optimizer, config.train_steps, parameter_specs(self.model)
        )
        parts = config.optimizer.accumulation_steps
        self.train_step = steps.make_train_step(
            self.model, optimizer, config.seed, parts, self.mesh
        )
        self.eval_step = evaluation.make_eval_step(self.model, self.mesh, parts)
        found = self._restored(steps.abstract_state(self.model, optimizer, self.mesh))
        place: Mapping[str, Any] = {}
        if found is None:
            self.state = steps.create_state(self.model, optimizer, config.seed, self.mesh)
        else:
            self.state, place = found
        self.start = int(self.state.step)
        self.evaluation_due = place.get("evaluation_due", False)
        next_sample = place.get("next_sample", self.start * config.data.batch_size)
        self.rows = sharding.local_rows(config.data.batch_size, self.mesh)
        self.batches = train_batches(
            dataset.train,
            config.model.context_length,
            config.data.batch_size,
            config.seed,
            self.rows,
            first=next_sample // config.data.batch_size,
        )
        self.last_evaluation: dict[str, float] = {}
        self.terminated = False

    def run(self) -> dict[str, float]:
        """Runs the remaining steps."""
        config, start = self.config, self.start
        if start >= config.train_steps and not self.evaluation_due:
            say(f"{self.workdir} is at step {start} already; to go on, raise --config.train_steps")
            return {}
        say(self._summary())
        writer: MetricWriter | SilentWriter = agreed(
            lambda: (
                MetricWriter(self.workdir, start, config.to_dict(), config.wandb)
                if is_first()
                else SilentWriter()
            )
        )
        silent = None if is_first() else True
        bar = tqdm(
            total=config.train_steps, initial=start, unit="step", disable=silent, dynamic_ncols=True
        )
        with Stop() as stop, bar:
            try:
                self._loop(writer, bar, stop)
            finally:
                writer.close()
        step = int(self.state.step)
        if step < config.train_steps or self.evaluation_due:
            self.terminated = stop.by_terminate
            say(
                f"stopped at step {step} and saved in {self.workdir}; the same command goes on "
                "from there"
            )
        else:
            say(f"done; the run is in {self.workdir}")
        return self.last_evaluation

    def _loop(self, writer: MetricWriter | SilentWriter, bar: tqdm, stop: Stop) -> None:
        config, log = self.config, StepLog(self.config, self.model, self.schedule, writer, bar)
        if self.evaluation_due:  # it was cut short by a stop
            self._evaluate(self.start, writer, bar, stop)
            if stop.happened:
                return
            self._save(self.start)
        for step in range(self.start + 1, config.train_steps + 1):
            with log.waiting_for_input():
                batch = sharding.put_batch(next(self.batches), self.mesh)
            self.state, metrics = self.train_step(self.state, batch)
            log.after(step, metrics)
            stop.after(step)
            if step % config.eval_every == 0 or step == config.train_steps:
                with log.pause():
                    self._evaluate(step, writer, bar, stop)
            if step % config.checkpoint_every == 0 or step == config.train_steps or stop.happened:
                with log.pause():
                    self._save(step)
            if stop.happened:
                return

    def _evaluate(
        self, step: int, writer: MetricWriter | SilentWriter, bar: tqdm, stop: Stop
    ) -> None:
        """Evaluates and writes what is found; where a stop cuts it short, it is due again."""
        self.evaluation_due = True
        if stop.happened:
            return
        config, params = self.config, self.state.params
        n, size = config.model.context_length, config.data.batch_size
        windows = validation_batches(
            self.dataset.validation, n, size, config.eval_windows, self.rows
        )
        found = evaluation.evaluate_loss(
            self.eval_step, params, stop.cuts_short(windows), self.mesh
        )
        if stop.happened:  # what was seen may not be the whole
            return
        if self.dataset.prompts and config.eval_prompts:
            prompts = next(iter(self.dataset.prompts.values()))  # the set of all operations
            found["val/accuracy"] = evaluation.prompt_accuracy(
                self.model, sharding.on_one_device(params), prompts, limit=config.eval_prompts
            )
        writer.write(step, found)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        if is_first():
            bar.write(f"step {step:>6}  {shown}", file=sys.stderr)
        self.last_evaluation = found
        if found["val/loss"] < self.checkpoints.best_loss():
            self.checkpoints.save_best(step, params, found["val/loss"])
        self.evaluation_due = False

    def _save(self, step: int) -> None:
        if not steps.all_finite(self.state.params):
            raise diverged("parameters are not finite", step)
        place = {"next_sample": step * self.config.data.batch_size}
        self.checkpoints.save_latest(
            step, self.state, {**place, "evaluation_due": self.evaluation_due}
        )

    def _restored(self, shapes: steps.TrainState) -> tuple[Any, Mapping[str, Any]] | None:
        """The latest state and the place in the course of the run, if there is one."""
        found = self.checkpoints.restore_latest(shapes)
        if found is None and self.checkpoints.has("best") and not read_metrics(self.workdir):
            raise UserError(
                f"{self.workdir} holds parameters only (a converted checkpoint?), nothing to "
                "go on from; name another --workdir"
            )
        return found

    def _summary(self) -> str:
        config, count = self.config, sum(p.size for p in jax.tree.leaves(self.state.params))
        begin = f"going on from step {self.start}" if self.start else "training"
        return (
            f"{begin}: {config.model.name}, {count:,} parameters, to step {config.train_steps} "
            f"on {self._devices()}, in {self.workdir}"
        )

    def _devices(self) -> str:
        found = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
        if jax.process_count() > 1:
            found += f" of {jax.process_count()} processes"
        lengths = [f"{axis} {length}" for axis, length in self.mesh.shape.items() if length > 1]
        return found + (f" ({' x '.join(lengths)})" if len(lengths) > 1 else "")
