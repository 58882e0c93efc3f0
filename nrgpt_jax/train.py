"""Train a model.

    python -m nrgpt_jax.train --config=experiments/NAME.py --workdir=DIR [--config.field=value ...]

The same command resumes a stopped run. On several hosts, each process runs the command: unchanged
on TPU slices, under SLURM and under Open MPI; elsewhere with --coordinator_address=HOST:PORT,
--num_processes=P and --process_id=0 to P-1.
"""

from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli, host
from nrgpt_jax.training.loop import train


def main(config: ConfigDict, workdir: str, processes: int) -> None:
    """Prepare the host for fast training, and train."""
    parts = config.optimizer.accumulation_steps * processes
    if parts > 0 and config.data.batch_size % parts == 0:  # otherwise `train` raises the error
        host.use_all_cores(config.data.batch_size // parts)
    host.cache_compilations(workdir)
    train(config, workdir)


if __name__ == "__main__":
    config_flag, workdir_flag = cli.define_config_flag(), cli.define_workdir_flag()
    flags.mark_flag_as_required("config")
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
    count = flags.DEFINE_integer("num_processes", None, "Processes of the run.", 1)
    index = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0)

    def start() -> None:
        """Join the other processes, and train."""
        processes = host.join(address.value, count.value, index.value)
        main(config_flag.value, workdir_flag.value, processes)

    cli.run(start)
