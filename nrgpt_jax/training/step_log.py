"""Logging during training: metrics and a progress bar."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from nrgpt_jax.models import LanguageModel, flops
from nrgpt_jax.runs.metrics import MetricWriter, SilentWriter
from nrgpt_jax.training import depths
from nrgpt_jax.training.divergence import Diverged, SpikeWatch
from nrgpt_jax.training.step import IN_A_ROW, TrainState

Hook: TypeAlias = Callable[[int, Mapping[str, float], TrainState | None], object]
"""`hook(step, metrics, state)`: the state after that step at an evaluation; None otherwise, since
its arrays were donated to the next step."""


class StepLog:
    """A logger that writes a step's metrics after the next is dispatched, to keep devices busy.

    `tokens_per_second`, `mfu` (the share of the devices' peak, see `flops`) and `input_wait` (the
    share of the time spent waiting for batches) cover the steps since the previous line, without
    evaluation and saving. They are omitted from the first line, whose time includes compilation,
    and from the last line if it comes early.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: LanguageModel,
        schedule: optax.Schedule,
        writer: MetricWriter | SilentWriter,
        bar: tqdm,
        spikes: SpikeWatch,
        hooks: Sequence[Hook] = (),
    ):
        self.config, self.schedule, self.writer, self.bar = config, schedule, writer, bar
        self.spikes, self.hooks = spikes, hooks
        self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self.tokens_per_step = config.data.batch_size * config.model.context_length
        self.flops_per_token = flops.train_flops_per_token(model)
        uniform = depths.of_config(config) is None  # otherwise FLOPs differ between steps
        self.peak = flops.peak_flops() if uniform else None
        self.compiled = False
        self._begin_interval()

    def _begin_interval(self) -> None:
        self.begin, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Count the time inside as waiting for input."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Write pending metrics; exclude the time inside from throughput."""
        self.flush()
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Queue the metrics of a dispatched step."""
        self.flush()
        self.steps += 1
        self.bar.update()
        if self._is_line(step) or step % self.config.max_skipped_steps == 0:
            self.pending = step, metrics

    def _is_line(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step in (1, self.config.train_steps)

    def flush(self) -> None:
        """Write pending metrics. Raises Diverged or Spike."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        in_a_row = int(metrics[IN_A_ROW])
        if in_a_row >= self.config.max_skipped_steps:
            what = f"loss or gradient was not finite in {in_a_row} steps in a row, to step {step}"
            first = step - in_a_row + 1
            raise Diverged(what, first, first - 1)
        if not self._is_line(step):
            return
        scalars = {name: float(value) for name, value in metrics.items() if name != IN_A_ROW}
        skipped = scalars["train/skipped_steps"] = int(scalars["train/skipped_steps"])
        scalars["train/learning_rate"] = float(self.schedule(step - 1 - skipped))
        shown = f"loss {scalars['train/loss']:.3f}"
        if skipped:
            shown += f", {skipped} skipped"
        compiled_before, self.compiled = self.compiled, True
        if compiled_before and self.steps >= self.config.log_every - 1:
            scalars |= self._speed()
            shown += f", {scalars['tokens_per_second']:,.0f} tokens/s"
        self._begin_interval()
        self.writer.write(step, scalars)
        for hook in self.hooks:
            hook(step, scalars, None)
        self.bar.set_postfix_str(shown, refresh=False)
        self.spikes.see(step, scalars["train/loss"])

    def _speed(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.begin
        speed = self.steps * self.tokens_per_step / seconds
        speeds = {"tokens_per_second": speed, "input_wait": self.waited / seconds}
        if self.peak:
            speeds["mfu"] = speed * self.flops_per_token / self.peak
        return speeds
