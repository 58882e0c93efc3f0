"""Trains a model.

    python -m nrgpt_jax.train --config=experiments/NAME.py --workdir=DIR [--config.field=value ...]

The same command goes on with a run that was stopped.
"""

from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli, host
from nrgpt_jax.training.loop import train


def main(config: ConfigDict, workdir: str) -> None:
    """`train`, on a machine prepared for it."""
    parts = config.optimizer.accumulation_steps
    if parts > 0 and config.data.batch_size % parts == 0:  # else `train` says what is wrong
        host.use_all_cores(config.data.batch_size // parts)
    host.cache_compilations(workdir)
    train(config, workdir)


if __name__ == "__main__":
    config_flag, workdir_flag = cli.define_config_flag(), cli.define_workdir_flag()
    flags.mark_flag_as_required("config")
    cli.run(lambda: main(config_flag.value, workdir_flag.value))
