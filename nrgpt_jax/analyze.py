"""Analyze the energies of a trained model on a text.

    python -m nrgpt_jax.analyze --workdir=DIR [--prompt=TEXT] [--num_steps=40] [--out=FOLDER]

Writes figures (PNG), all numbers (analysis.json) and an interactive page (analysis.html) into
DIR/analysis. Prints the guarantees on the energies and the observed values. Exits with an error if
the observed steps contradict a guarantee.
"""

from pathlib import Path

from absl import flags

from nrgpt_jax import cli, host, paths
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.checkpoints import KINDS


def main(f: flags.FlagValues) -> None:
    """Analyze the model, print the report, and write the files."""
    cli.require_installed("analysis", "matplotlib", "bokeh")
    if f.out is None and paths.on_bucket(f.workdir):
        raise UserError("give --out=FOLDER: figures are written to a folder of this machine")
    from nrgpt_jax.analysis.report import contradiction, look, report, title, write

    host.cache_compilations(f.workdir)
    trained, result = look(f.workdir, f.prompt, f.num_steps, f.tolerance, f.checkpoint)
    print(report(result), flush=True)  # before writing, which fails on a full disk
    folder = Path(f.out or Path(f.workdir) / "analysis")
    write(folder, result, title(trained))
    print(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}", flush=True)
    if result.certificate.contradicted:
        raise UserError(contradiction(result))


def define_flags() -> None:
    """Define all flags of the program."""
    cli.define_workdir_flag()
    flags.DEFINE_string("prompt", None, "Text; by default the beginning of the validation split.")
    flags.DEFINE_integer("num_steps", None, "Steps of the descent; by default 4 x training's.", 1)
    flags.DEFINE_float(
        "tolerance", 1e-2, "Relative change of g in a step that counts as converged."
    )
    flags.DEFINE_enum("checkpoint", "best", KINDS, "Which checkpoint of a run.")
    flags.DEFINE_string("out", None, "Folder to write to; by default DIR/analysis.")


if __name__ == "__main__":
    define_flags()
    cli.run(lambda: main(flags.FLAGS))
