"""The loop of training: steps, evaluations, checkpoints, a stop between two steps."""

import signal
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from nrgpt_jax.datasets import Dataset, load_dataset
from nrgpt_jax.datasets.files import absolute
from nrgpt_jax.datasets.pipeline import check_length, train_batches, validation_batches
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import check_run, locked, record_run
from nrgpt_jax.runs.metrics import MetricWriter, read_metrics
from nrgpt_jax.training import evaluation, optimizers
from nrgpt_jax.training import step as steps
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.step_log import StepLog, diverged, say


def train(config: ConfigDict, workdir: Path | str) -> dict[str, float]:
    """Trains until `config.train_steps`, going on from the latest checkpoint if there is one.

    Returns:
      The metrics of the last evaluation (empty if none was reached).

    Raises:
      UserError: the configuration, the data or the run directory do not allow it.
    """
    workdir = Path(workdir)
    config = config.copy_and_resolve_references()
    check_config(config, jax.device_count())
    dataset = load_dataset(config.data)
    check_length(dataset.train, config.model.context_length, "train")
    check_length(dataset.validation, config.model.context_length, "validation")
    set_vocabulary_size(config, dataset)
    config.data.fingerprint = dataset.fingerprint
    if config.data.path:  # the run can be evaluated from anywhere
        config.data.path = absolute(config.data.path)
    changes = check_run(workdir, config, dataset.tokenizer)
    with locked(workdir), Checkpoints(workdir, writable=True) as checkpoints:
        trainer = Trainer(config, workdir, dataset, checkpoints)
        record_run(workdir, config, dataset.tokenizer)
        for change in changes:
            say(f"changed since this run was started: {change}")
        return trainer.run()


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
        self.mesh = sharding.make_mesh()
        self.model = create_model(config)
        self.schedule = optimizers.learning_rate_schedule(config.optimizer, config.train_steps)
        optimizer = optimizers.create_optimizer(
            config.optimizer, config.train_steps, parameter_specs(self.model)
        )
        parts = config.optimizer.accumulation_steps
        self.train_step = steps.make_train_step(
            self.model, optimizer, config.seed, parts, self.mesh
        )
        self.eval_step = evaluation.make_eval_step(self.model, self.mesh)
        self.state = steps.create_state(self.model, optimizer, config.seed, self.mesh)
        self.batches = train_batches(
            dataset.train,
            config.model.context_length,
            config.data.batch_size,
            config.seed,
            jax.process_index(),
            jax.process_count(),
        )
        self.start = self._restore()
        self.last_evaluation: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Runs the remaining steps."""
        config, start = self.config, self.start
        if start >= config.train_steps:
            say(f"{self.workdir} is at step {start} already; to go on, raise --config.train_steps")
            return {}
        say(self._summary())
        writer = MetricWriter(self.workdir, start, config.to_dict(), config.wandb)
        bar = tqdm(
            total=config.train_steps, initial=start, unit="step", disable=None, dynamic_ncols=True
        )
        with _Interruption() as interruption, bar:
            try:
                self._loop(writer, bar, interruption)
            finally:
                writer.close()
        step = int(self.state.step)
        if step < config.train_steps:
            say(
                f"stopped at step {step} and saved in {self.workdir}; the same command goes on "
                "from there"
            )
        else:
            say(f"done; the run is in {self.workdir}")
        return self.last_evaluation

    def _loop(self, writer: MetricWriter, bar: tqdm, interruption: "_Interruption") -> None:
        config, log = self.config, StepLog(self.config, self.model, self.schedule, writer, bar)
        for step in range(self.start + 1, config.train_steps + 1):
            with log.waiting_for_input():
                batch = sharding.put_batch(next(self.batches), self.mesh)
            self.state, metrics = self.train_step(self.state, batch)
            log.after(step, metrics)
            last = step == config.train_steps or interruption.happened
            if step % config.eval_every == 0 or step == config.train_steps:
                with log.pause():
                    self._evaluate(step, writer, bar)
            if step % config.checkpoint_every == 0 or last:
                with log.pause():
                    self._save(step)
            if last:
                return

    def _evaluate(self, step: int, writer: MetricWriter, bar: tqdm) -> None:
        config, params = self.config, self.state.params
        n, size = config.model.context_length, config.data.batch_size
        windows = validation_batches(self.dataset.validation, n, size, config.eval_windows)
        found = evaluation.evaluate_loss(self.eval_step, params, windows, self.mesh)
        if self.dataset.prompts and config.eval_prompts:
            prompts = next(iter(self.dataset.prompts.values()))  # the set of all operations
            once = jax.tree.map(lambda p: p.addressable_data(0), params)  # not on every device
            found["val/accuracy"] = evaluation.prompt_accuracy(
                self.model, once, prompts, limit=config.eval_prompts
            )
        writer.write(step, found)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        bar.write(f"step {step:>6}  {shown}", file=sys.stderr)
        self.last_evaluation = found
        if found["val/loss"] < self.checkpoints.best_loss():
            self.checkpoints.save_best(step, params, found["val/loss"])

    def _save(self, step: int) -> None:
        if not steps.all_finite(self.state.params):
            raise diverged("parameters are not finite", step)
        self.checkpoints.save_latest(step, self.state, self.batches)

    def _restore(self) -> int:
        shapes = sharding.abstract(self.state, jax.tree.map(lambda leaf: leaf.sharding, self.state))
        found = self.checkpoints.restore_latest(shapes, self.batches)
        if found is None:
            if self.checkpoints.has("best") and not read_metrics(self.workdir):
                raise UserError(
                    f"{self.workdir} holds parameters only (a converted checkpoint?), nothing to "
                    "go on from; name another --workdir"
                )
            return 0
        self.state = found
        return int(found.step)

    def _summary(self) -> str:
        config, count = self.config, sum(p.size for p in jax.tree.leaves(self.state.params))
        begin = f"going on from step {self.start}" if self.start else "training"
        return (
            f"{begin}: {config.model.name}, {count:,} parameters, to step {config.train_steps} "
            f"on {jax.device_count()} {jax.devices()[0].platform} device(s), in {self.workdir}"
        )


class _Interruption:
    """Notes the first Ctrl-C or SIGTERM, to stop between two steps; the second one acts at once."""

    def __init__(self):
        self.happened = False

    def __enter__(self) -> "_Interruption":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {s: signal.signal(s, self._note) for s in signals}
        return self

    def _note(self, number, frame) -> None:
        del frame
        self.happened = True
        signal.signal(number, self._previous[number])
        say("\nstopping after this step and saving; once more to stop at once")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
