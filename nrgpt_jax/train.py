"""Trains a model.

    python -m nrgpt_jax.train --config=experiments/NAME.py --workdir=DIR [--config.field=value ...]

The same command goes on with a run that was stopped.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from nrgpt_jax import cli, evaluation, flops, host, optimizers, sharding, training
from nrgpt_jax.checkpoints import Checkpoints
from nrgpt_jax.datasets import Dataset, load_dataset
from nrgpt_jax.errors import UserError
from nrgpt_jax.input_pipeline import check_length, train_batches, validation_batches
from nrgpt_jax.metrics import MetricWriter, read_metrics
from nrgpt_jax.models import create_model
from nrgpt_jax.runs import check_run, locked, record_run
from nrgpt_jax.validation import validate


def train(config: ConfigDict, workdir: Path | str) -> dict[str, float]:
    """Trains until `config.train_steps`, going on from the latest checkpoint if there is one.

    Returns:
      The metrics of the last evaluation (empty if none was reached).

    Raises:
      UserError: the configuration, the data or the run directory do not allow it.
    """
    workdir = Path(workdir)
    config = config.copy_and_resolve_references()
    validate(config, jax.device_count())
    dataset = load_dataset(config.data)
    check_length(dataset.train, config.model.context_length, "train")
    check_length(dataset.validation, config.model.context_length, "validation")
    set_vocabulary_size(config, dataset)
    config.data.fingerprint = dataset.fingerprint
    if config.data.path:  # the run can be evaluated from anywhere
        config.data.path = str(Path(config.data.path).expanduser().resolve())
    changes = check_run(workdir, config, dataset.tokenizer)
    with locked(workdir), Checkpoints(workdir, writable=True) as checkpoints:
        trainer = Trainer(config, workdir, dataset, checkpoints)
        record_run(workdir, config, dataset.tokenizer)
        for change in changes:
            _say(f"changed since this run was started: {change}")
        return trainer.run()


def set_vocabulary_size(config: ConfigDict, dataset: Dataset) -> None:
    """Resolves `model.vocab_size`: 0 is the tokenizer's, more is padding, less an error."""
    size = len(dataset.tokenizer.vocabulary)
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
        optimizer = optimizers.create_optimizer(config.optimizer, config.train_steps)
        parts = config.optimizer.accumulation_steps
        self.train_step = training.make_train_step(
            self.model, optimizer, config.seed, parts, self.mesh
        )
        self.eval_step = evaluation.make_eval_step(self.model, self.mesh)
        self.state = training.create_state(self.model, optimizer, config.seed, self.mesh)
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
            _say(f"{self.workdir} is at step {start} already; to go on, raise --config.train_steps")
            return {}
        _say(self._summary())
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
            _say(
                f"stopped at step {step} and saved in {self.workdir}; the same command goes on "
                "from there"
            )
        else:
            _say(f"done; the run is in {self.workdir}")
        return self.last_evaluation

    def _loop(self, writer: MetricWriter, bar: tqdm, interruption: "_Interruption") -> None:
        config, log = self.config, _StepLog(self, writer, bar)
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
        if not training.all_finite(self.state.params):
            raise _diverged("parameters are not finite", step)
        self.checkpoints.save_latest(step, self.state.params, self.state.optimizer, self.batches)

    def _restore(self) -> int:
        state = self.state
        found = self.checkpoints.restore_latest(state.params, state.optimizer, self.batches)
        if found is None:
            if self.checkpoints.has("best") and not read_metrics(self.workdir):
                raise UserError(
                    f"{self.workdir} holds parameters only (a converted checkpoint?), nothing to "
                    "go on from; name another --workdir"
                )
            return 0
        step, params, optimizer = found
        self.state = training.TrainState(state.step + step, params, optimizer)
        return step

    def _summary(self) -> str:
        config, count = self.config, sum(p.size for p in jax.tree.leaves(self.state.params))
        begin = f"going on from step {self.start}" if self.start else "training"
        return (
            f"{begin}: {config.model.name}, {count:,} parameters, to step {config.train_steps} "
            f"on {jax.device_count()} {jax.devices()[0].platform} device(s), in {self.workdir}"
        )


class _StepLog:
    """Writes the metrics of a step after the next one was dispatched, so that devices are busy.

    `tokens_per_second`, `mfu` (the share of the devices' peak, see `flops`) and `input_wait` (the
    share of the time spent waiting for batches) are of the steps since the line before, without
    evaluation and saving. They are left out of the first line, whose steps were compiled first,
    and of the last where it comes early.
    """

    def __init__(self, trainer: Trainer, writer: MetricWriter, bar: tqdm):
        self.trainer, self.writer, self.bar = trainer, writer, bar
        self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
        config = trainer.config
        self.tokens_per_step = config.data.batch_size * config.model.context_length
        self.flops_per_token = flops.train_flops_per_token(config.model)
        self.peak = flops.peak_flops()
        self.compiled = False
        self._begin_interval()

    def _begin_interval(self) -> None:
        self.begin, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Measures what happens inside."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Writes what is pending; what happens inside does not count."""
        self.flush()
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a dispatched step."""
        self.flush()
        self.steps += 1
        self.bar.update()
        config = self.trainer.config
        if step % config.log_every == 0 or step in (1, config.train_steps):
            self.pending = step, metrics

    def flush(self) -> None:
        """Writes what is pending."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        scalars = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(scalars["train/loss"]):
            raise _diverged(f"training loss is {scalars['train/loss']}", step)
        scalars["train/learning_rate"] = float(self.trainer.schedule(step - 1))
        shown = f"loss {scalars['train/loss']:.3f}"
        compiled_before, self.compiled = self.compiled, True
        if compiled_before and self.steps >= self.trainer.config.log_every - 1:
            scalars |= self._speed()
            shown += f", {scalars['tokens_per_second']:,.0f} tokens/s"
        self._begin_interval()
        self.writer.write(step, scalars)
        self.bar.set_postfix_str(shown, refresh=False)

    def _speed(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.begin
        speed = self.steps * self.tokens_per_step / seconds
        found = {"tokens_per_second": speed, "input_wait": self.waited / seconds}
        if self.flops_per_token and self.peak:
            found["mfu"] = speed * self.flops_per_token / self.peak
        return found


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
        _say("\nstopping after this step and saving; once more to stop at once")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _diverged(what: str, step: int) -> UserError:
    return UserError(
        f"the {what} at step {step}; lower --config.optimizer.learning_rate and run the command "
        "again to go on from the last checkpoint"
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(config: ConfigDict, workdir: str) -> None:
    """`train`, on a machine prepared for it."""
    parts = config.optimizer.accumulation_steps
    if parts > 0 and config.data.batch_size % parts == 0:  # else `train` says what is wrong
        host.prepare(config.data.batch_size // parts)
    host.cache_compilations(workdir)
    train(config, workdir)


if __name__ == "__main__":
    config_flag, workdir_flag = cli.define_config_flag(), cli.define_workdir_flag()
    flags.mark_flag_as_required("config")
    cli.run(lambda: main(config_flag.value, workdir_flag.value))
