"""The trainer of one run: its state, its data, and the loop over steps."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets import Dataset
from nrgpt_jax.datasets.pipeline import Rows, train_batches, validation_batches
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.models.evaluators import chosen
from nrgpt_jax.processes import is_first, log_host0, raise_on_all_hosts
from nrgpt_jax.runs.checkpoints import all_finite, parts_of
from nrgpt_jax.training import depths, evaluation, optimizers
from nrgpt_jax.training import step as steps
from nrgpt_jax.training.config_notes import notes
from nrgpt_jax.training.divergence import MOST_ROLLBACKS, Diverged, Spike, SpikeWatch, ended
from nrgpt_jax.training.run_directory import RunDirectory
from nrgpt_jax.training.step_log import Hook, StepLog
from nrgpt_jax.training.stop import Stop
from nrgpt_jax.training.warm_start import folder_of, initial_params


class Trainer:
    """The trainer of one run: its state, its data, and the loop over steps."""

    def __init__(
        self,
        config: ConfigDict,
        run: RunDirectory,
        dataset: Dataset,
        stop: Stop,
        optimizer: optax.GradientTransformation | None = None,
        hooks: Sequence[Hook] = (),
    ):
        self.config, self.run_directory, self.dataset, self.stop = config, run, dataset, stop
        self.hooks = hooks
        self.mesh = sharding.make_mesh(config.mesh)
        self.model = create_model(config)
        self.schedule = optimizers.learning_rate_schedule(config.optimizer, config.train_steps)
        if optimizer is None:
            specs = parameter_specs(self.model)
            optimizer = optimizers.create_optimizer(config.optimizer, config.train_steps, specs)
        parts = config.optimizer.accumulation_steps
        settings = depths.of_config(config), tuple(config.step_metrics)
        self.train_step = steps.make_train_step(
            self.model, optimizer, config.seed, parts, self.mesh, *settings
        )
        num_symbols = dataset.tokenizer.size
        self.eval_step = evaluation.make_eval_step(
            self.model, self.mesh, parts, num_symbols, tuple(config.evaluators)
        )
        self.rows = sharding.local_rows(config.data.batch_size, self.mesh)
        self.shapes = steps.abstract_state(self.model, optimizer, self.mesh)
        result = run.restored(self.shapes)
        if result is None:
            result = self._first_state(optimizer), {}
        self._go_on_from(*result)
        self.spikes = SpikeWatch(config.spike_factor, result[1].get("spikes"))
        self.last_evaluation: dict[str, float] = {}

    def _first_state(self, optimizer: optax.GradientTransformation) -> steps.TrainState:
        config, model, params = self.config, self.model, None
        if config.init_from:  # before anything is compiled
            folder = folder_of(config.init_from, config.seed, self.run_directory.path)
            params = initial_params(folder, model, self.dataset.tokenizer)
        state: Any = steps.create_state(model, optimizer, config.seed, self.mesh)
        if params is None:
            return state
        where = jax.tree.map(lambda leaf: leaf.sharding, self.shapes.params)
        return state.replace(params=jax.device_put(params, where))

    def _go_on_from(self, state: Any, place: Mapping[str, Any]) -> None:
        """Continue from a state and the place in the run that was saved with it."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.shapes.skipped)
        counts = (place.get(name, 0) for name in ("skipped_steps", steps.IN_A_ROW))
        total, in_a_row = (jax.device_put(np.int32(count), where) for count in counts)
        self.state = state.replace(skipped=total, skipped_in_a_row=in_a_row)
        self.start = int(state.step)
        self.evaluation_due = place.get("evaluation_due", False)
        size = self.config.data.batch_size
        next_batch = place.get("next_sample", self.start * size) // size
        self.ahead = next_batch - self.start  # batches skipped by rollbacks
        self.mark = place.get("metrics")
        self.batches = self._batches(next_batch, self.rows)

    def _batches(self, first: int, rows: Rows | None) -> Iterator[Batch]:
        config = self.config
        return train_batches(
            self.dataset.train,
            config.model.context_length,
            config.data.batch_size,
            config.seed,
            rows,
            first,
        )

    def run(self) -> dict[str, float]:
        """Run the remaining steps; return the metrics of the last evaluation."""
        config, start = self.config, self.start
        if self.done():
            workdir = self.run_directory.path
            log_host0(
                f"{workdir} is at step {start} already; to continue, raise --config.train_steps"
            )
            return {}
        log_host0(self._summary())
        for note in notes(config, len(self.dataset.train) - config.model.context_length):
            log_host0(note)
        silent = None if is_first() else True
        bar = tqdm(
            total=config.train_steps, initial=start, unit="step", disable=silent, dynamic_ncols=True
        )
        with bar:
            while not self._course(bar):
                bar.reset(config.train_steps)
                bar.update(self.start)
        self.run_directory.check()
        where = self.run_directory.path
        if self.done():
            log_host0(f"done; the run is in {where}")
        else:
            step = int(self.state.step)
            log_host0(
                f"stopped at step {step} and saved in {where}; the same command resumes from there"
            )
        return self.last_evaluation

    def done(self) -> bool:
        """Return whether all steps and the evaluation after them are complete."""
        return int(self.state.step) >= self.config.train_steps and not self.evaluation_due

    def _course(self, bar: tqdm) -> bool:
        """Run the steps after `start`; return False if a loss spike has restored a checkpoint."""
        with self.run_directory.writer(self.start, self.mark) as self.writer:
            try:
                self._loop(bar)
            except Diverged as error:
                error.first = max(error.first, self.start + 1)  # within these steps
                batches = self._batches(error.first - 1 + self.ahead, None)
                where, store = self.run_directory.path, self.run_directory.checkpoints
                raise ended(error, where, next(batches), store) from None
            except Spike as error:
                self._roll_back(error)
                return False
        return True

    def _roll_back(self, spike: Spike) -> None:
        """Return to the last checkpoint; the data continue from the current batch."""
        if self.spikes.rollbacks >= MOST_ROLLBACKS:
            raise UserError(
                f"{spike}, after {self.spikes.rollbacks} returns to a checkpoint; lower "
                "--config.optimizer.learning_rate and run the command again"
            )
        result = self.run_directory.restored(self.shapes)
        assert result is not None, "a checkpoint has armed the watch"
        state, place = result
        self.spikes = self.spikes.went_back(place.get("spikes"))
        next_batch = spike.step + self.ahead
        self._go_on_from(state, {**place, "next_sample": next_batch * self.config.data.batch_size})
        log_host0(f"\n{spike}: returning to step {self.start}; training continues with other data")

    def _loop(self, bar: tqdm) -> None:
        config, stop = self.config, self.stop
        log = StepLog(config, self.model, self.schedule, self.writer, bar, self.spikes, self.hooks)
        if self.evaluation_due:  # a stop interrupted it
            stop.begin()
            raise_on_all_hosts(self.writer.open)
            self._evaluate(self.start, bar)
            if self.evaluation_due:  # interrupted again
                return
            self._save(self.start)
        for step in range(self.start + 1, config.train_steps + 1):
            with log.waiting_for_input():
                batch = sharding.put_batch(next(self.batches), self.mesh)
            self.state, metrics = self.train_step(self.state, batch)
            if step == self.start + 1:
                stop.begin()
                self.run_directory.begin(self.start)
                raise_on_all_hosts(self.writer.open)
            log.after(step, metrics)
            stops, last = stop.asked(), step == config.train_steps
            if step % config.eval_every == 0 or last:
                with log.pause():
                    self._evaluate(step, bar)
                stops = stop.happened
            if step % config.checkpoint_every == 0 or last or stops:
                with log.pause():
                    self._save(step)
            if stops:  # a later signal is handled after the next step
                return

    def _evaluate(self, step: int, bar: tqdm) -> None:
        """Evaluate and log the metrics; an evaluation that a stop interrupts remains due."""
        self.evaluation_due = True
        with self.stop.rescuing(lambda: self._save(step)):
            result = {} if self.stop.happened else self._evaluated(step)
        if self.stop.happened:  # the metrics may be incomplete
            return
        self.writer.write(step, result)
        for hook in self.hooks:
            hook(step, result, self.state)
        if not math.isfinite(result["val/loss"]):
            in_a_row = int(self.state.skipped_in_a_row)
            what = f"validation loss at step {step} is {result['val/loss']}"
            raise Diverged(what, min(step, step - in_a_row + 1), step - in_a_row)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in result.items())
        if is_first():
            bar.write(f"step {step:>6}  {shown}", file=sys.stderr)
        self.last_evaluation = result
        checkpoints, loss = self.run_directory.checkpoints, result["val/loss"]
        if loss < checkpoints.best_loss():
            self.run_directory.check()
            proven = not int(self.state.skipped_in_a_row)
            checkpoints.save_best(step, self.state.params, loss, prune=proven)
        self.evaluation_due = False

    def _evaluated(self, step: int) -> dict[str, float]:
        """Compute the losses and the accuracy on prompts."""
        config, params = self.config, self.state.params
        n, size = config.model.context_length, config.data.batch_size
        windows = validation_batches(
            self.dataset.validation, n, size, config.eval_windows, self.rows
        )
        windows = self.stop.cuts_short(windows)
        result = evaluation.evaluate_loss(self.eval_step, params, windows, self.mesh)
        if self.dataset.prompts and config.eval_prompts and not self.stop.happened:
            prompts = next(iter(self.dataset.prompts.values()))  # ListOps: all operations
            params = sharding.on_one_device(params)
            result["val/accuracy"] = evaluation.prompt_accuracy(
                self.model,
                params,
                prompts,
                limit=config.eval_prompts,
                cut=self.stop.cuts_short,
            )
            for name, function in chosen(config.evaluators, "prompts").items():
                result[f"val/{name}"] = float(function(self.model, params, prompts))
        return result

    def _save(self, step: int) -> None:
        """Save the state; after a skipped step nothing is pruned, since the state may be bad."""
        with self.stop.saving:
            self.run_directory.check()
            in_a_row = int(self.state.skipped_in_a_row)
            if not all_finite(parts_of(self.state)):  # already compiled if the run was restored
                raise Diverged(f"state after step {step} is not finite", step, step)
            place = {
                "next_sample": (step + self.ahead) * self.config.data.batch_size,
                "evaluation_due": self.evaluation_due,
                "skipped_steps": int(self.state.skipped),
                steps.IN_A_ROW: in_a_row,
                "metrics": raise_on_all_hosts(self.writer.mark),
                "spikes": self.spikes.record(),
            }
            checkpoints = self.run_directory.checkpoints
            checkpoints.save_latest(step, self.state, place, prune=not in_a_row)
            self.spikes.armed = True

    def _summary(self) -> str:
        config, count = self.config, sum(p.size for p in jax.tree.leaves(self.state.params))
        begin = f"resuming from step {self.start}" if self.start else "training"
        return (
            f"{begin}: {config.model.name}, {count:,} parameters, to step {config.train_steps} "
            f"on {self._devices()}, in {self.run_directory.path}"
        )

    def _devices(self) -> str:
        result = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
        if jax.process_count() > 1:
            result += f" of {jax.process_count()} processes"
        lengths = [f"{axis} {length}" for axis, length in self.mesh.shape.items() if length > 1]
        return result + (f" ({' x '.join(lengths)})" if len(lengths) > 1 else "")
