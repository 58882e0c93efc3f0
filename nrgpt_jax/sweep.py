"""Train the runs of a sweep.

    python -m nrgpt_jax.sweep --sweep=experiments/listops_transition.py[:SCALE] [--runs=DIR]
    python -m nrgpt_jax.sweep --launcher=slurm --option=timeout_min=60 --option=gpus_per_node=1 ...
    python -m nrgpt_jax.sweep --config.field=value ...                    # in every run

The `get_sweep(scale)` of an experiment file returns configurations by run name; each run has a
directory `DIR/NAME`. The same command resumes a sweep: trained runs are skipped, stopped runs
resume, failed runs are reported (`--retry` trains them again). `DIR/summary.csv` has a line for
each run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from nrgpt_jax import cli, paths
from nrgpt_jax.errors import UserError
from nrgpt_jax.sweeps.engine import LAUNCHERS, Launcher, run_all
from nrgpt_jax.sweeps.loading import load
from nrgpt_jax.sweeps.progress import Watch, write_summary


def options(pairs: Sequence[str]) -> dict[str, int | str]:
    """Parse `NAME=VALUE` pairs, with whole numbers as int. Raises UserError for other syntax."""
    result: dict[str, int | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--option={pair!r} is not possible: NAME=VALUE")
        result[name] = int(value) if value.isdecimal() else value
    return result


def main(f: flags.FlagValues, changes: Mapping[str, Any]) -> None:
    """Train the runs with `changes` set in all configurations; write the summary."""
    path, _, scale = f.sweep.partition(":")
    runs = paths.on_this_machine(f.runs or f"runs/{Path(path).stem}{'-' if scale else ''}{scale}")
    configs = {runs / name: config for name, config in load(Path(path), scale, changes).items()}
    watch = Watch(configs)
    launcher = Launcher(f.launcher, f.jobs, options(f.option))
    failed = run_all(configs, launcher, side_by_side=f.side_by_side, retry=f.retry, watch=watch)
    watch.show()
    lines = write_summary(runs / "summary.csv", configs)
    print(f"written to {runs / 'summary.csv'}")
    if failed:
        workdir, why = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(configs)} runs failed ({workdir}: {why}); its log is there; "
            "--retry trains them again"
        )
    left = [line["run"] for line in lines if line["state"] not in ("done", "diverged")]
    if left:
        raise UserError(
            f"{len(left)} of {len(configs)} runs are not trained to their end "
            f"({left[0]}); the same command resumes"
        )


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "FILE.py or FILE.py:SCALE, with get_sweep.", required=True)
    flags.DEFINE_string("runs", None, "Where the runs are; runs/FILE-SCALE by default.")
    flags.DEFINE_enum("launcher", "local", LAUNCHERS, "Here, or on a SLURM cluster.")
    flags.DEFINE_integer("jobs", 2, "Train N at a time.", 1)
    flags.DEFINE_multi_string("option", [], "NAME=VALUE of submitit: timeout_min=60, ...")
    flags.DEFINE_boolean("side_by_side", False, "Like runs as one program, for an accelerator.")
    flags.DEFINE_boolean("retry", False, "Train again what has failed.")
    changed = cli.define_changes_flag()
    cli.run(lambda: main(flags.FLAGS, cli.changes(changed)))
