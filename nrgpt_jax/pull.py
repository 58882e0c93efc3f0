"""Download a model from the Hugging Face hub, for `sample`, `analyze` and other programs.

python -m nrgpt_jax.pull --source=USER/NAME [--out=FOLDER]
"""

from pathlib import Path

from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.runs.hub import pull


def main(f: flags.FlagValues) -> None:
    """Download the model, and print its folder."""
    print(pull(f.source, f.out or Path("runs") / f.source.rpartition("/")[2]))


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "USER/NAME of the repository.", required=True)
    flags.DEFINE_string("out", None, "Folder to write; by default runs/NAME.")
    cli.run(lambda: main(flags.FLAGS))
