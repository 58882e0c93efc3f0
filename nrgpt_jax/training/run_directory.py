"""Output of training to the run directory: nothing before the first step, each file atomically."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.processes import host0_first, is_first, log_host0, raise_on_all_hosts
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import Lock, record_run
from nrgpt_jax.runs.metrics import MetricWriter, SilentWriter, read_metrics
from nrgpt_jax.training.step import TrainState


class RunDirectory:
    """The output of a run.

    Args:
      path: the locked directory.
      config, tokenizer: the configuration and tokenizer to record after the first step.
      changes: the fields of the configuration that differ from the recorded ones.
      lock: the lock of the first process; None on the others.
    """

    def __init__(
        self,
        path: Path,
        config: ConfigDict,
        tokenizer: Tokenizer,
        changes: Sequence[str],
        lock: Lock | None,
    ):
        self.path, self._config, self._tokenizer = path, config, tokenizer
        self._changes, self._lock = changes, lock
        self.checkpoints = Checkpoints(
            path,
            writable=True,
            keep=config.checkpoint_keep,
            keep_every=config.checkpoint_keep_every,
        )

    def check(self) -> None:
        """Raise OSError on all processes if the directory was removed or replaced."""
        host0_first(lambda: self._lock and self._lock.check())

    def restored(self, shapes: TrainState) -> tuple[Any, Mapping[str, Any]] | None:
        """Restore the latest state and its place in the run; None if there is no checkpoint."""
        result = self.checkpoints.restore_latest(shapes)
        if result is None and self.checkpoints.has("best") and not read_metrics(self.path):
            raise UserError(
                f"{self.path} holds parameters only (a converted checkpoint?), nothing to "
                "resume from; name another --workdir"
            )
        return result

    def begin(self, start: int) -> None:
        """Record the configuration and tokenizer, after the first step that follows `start`."""
        self.check()
        host0_first(
            lambda: record_run(self.path, self._config, self._tokenizer, start, self._changes)
        )
        self.checkpoints.drop_best_after(start)
        for change in self._changes:
            log_host0(f"changed since this run was started: {change}")
        self._changes = ()

    @contextlib.contextmanager
    def writer(
        self, start: int, mark: Mapping[str, Any] | None
    ) -> Iterator[MetricWriter | SilentWriter]:
        """Open the metric writer for steps after `start`; `mark` is from the checkpoint there."""
        config = self._config
        writer: MetricWriter | SilentWriter = SilentWriter()
        if is_first():
            writer = MetricWriter(self.path, start, config.to_dict(), config.wandb, mark)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(OSError):  # report the first error, not its consequences
                writer.close()
            raise
        raise_on_all_hosts(writer.close)
