"""Upload a model to the Hugging Face hub.

    python -m nrgpt_jax.push --workdir=RUN --to=USER/NAME [--public]

Log in first with `hf auth login`, or set HF_TOKEN.
"""

from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.runs.checkpoints import KINDS
from nrgpt_jax.runs.hub import push


def main(f: flags.FlagValues) -> None:
    """Upload the model, and print its address."""
    print(push(f.workdir, f.to, private=not f.public, checkpoint=f.checkpoint))


if __name__ == "__main__":
    cli.define_workdir_flag()
    flags.DEFINE_string("to", None, "USER/NAME of the repository.", required=True)
    flags.DEFINE_boolean("public", False, "Everybody may see it.")
    flags.DEFINE_enum("checkpoint", "best", KINDS, "Which parameters of a run.")
    cli.run(lambda: main(flags.FLAGS))
