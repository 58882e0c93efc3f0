"""The run directory as training writes it: nothing before the first step, everything whole."""

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
    """Where a run is written.

    Args:
      path: the directory, locked.
      config, tokenizer: what is recorded when the first step is made.
      changes: the fields of the configuration that are other than recorded.
      lock: of the first process; None on the others.
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
        """Raises OSError, on all processes, when the directory is no longer there."""
        host0_first(lambda: self._lock and self._lock.check())

    def restored(self, shapes: TrainState) -> tuple[Any, Mapping[str, Any]] | None:
        """The latest state and the place in the course of the run, if there is one."""
        result = self.checkpoints.restore_latest(shapes)
        if result is None and self.checkpoints.has("best") and not read_metrics(self.path):
            raise UserError(
                f"{self.path} holds parameters only (a converted checkpoint?), nothing to "
                "resume from; name another --workdir"
            )
        return result

    def begin(self, start: int) -> None:
        """Records what the run goes by, now that a step was made after step `start`."""
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
        """What takes the metrics of steps after `start`; `mark` as of the checkpoint there."""
        config = self._config
        writer: MetricWriter | SilentWriter = SilentWriter()
        if is_first():
            writer = MetricWriter(self.path, start, config.to_dict(), config.wandb, mark)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(OSError):  # what ends the run is said, not what follows
                writer.close()
            raise
        raise_on_all_hosts(writer.close)
