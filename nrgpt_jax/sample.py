"""Continues a prompt with a trained model.

python -m nrgpt_jax.sample --workdir=DIR --prompt="ROMEO:" [--temperature=0.8] [--top_k=40]
    [--top_p=0.95] [--seed=0] [--num_samples=1] [--max_new_tokens=400]
"""

from pathlib import Path

from absl import flags

from nrgpt_jax import cli, host, sharding
from nrgpt_jax.checkpoints import KINDS, Checkpoints
from nrgpt_jax.datasets.listops import EOS
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation import Sampling, generate
from nrgpt_jax.models import abstract_params, create_model
from nrgpt_jax.runs import open_run


def sample(
    workdir: Path | str,
    prompt: str,
    *,
    sampling: Sampling,
    max_new_tokens: int = 400,
    num_samples: int = 1,
    seed: int = 0,
    checkpoint: str = "best",
) -> list[str]:
    """Prompts with their continuations, as text.

    Raises:
      UserError: the prompt is empty or has symbols outside the vocabulary, a sampling setting
        is out of range, or there is no such run.
    """
    _check(sampling, max_new_tokens, num_samples)
    workdir = Path(workdir)
    config, tokenizer = open_run(workdir)
    tokens = tokenizer.encode(prompt)
    if not len(tokens):
        raise UserError("the prompt is empty; give at least one token: --prompt=...")
    model = create_model(config)
    with Checkpoints(workdir) as checkpoints:
        wanted = sharding.abstract_replicated(abstract_params(model), sharding.make_mesh())
        _, params = checkpoints.restore_params(checkpoint, wanted)
    end = tokenizer.vocabulary.index(EOS) if EOS in tokenizer.vocabulary else None
    new = generate(
        model,
        {"params": params},
        [tokens] * num_samples,
        max_new_tokens,
        sampling=sampling,
        seed=seed,
        end_token=end,
        num_symbols=len(tokenizer.vocabulary),
    )
    return [tokenizer.decode([*tokens, *row]) for row in new]


def _check(sampling: Sampling, max_new_tokens: int, num_samples: int) -> None:
    for name, good, allowed in (
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, at most 1"),
        ("max_new_tokens", max_new_tokens > 0, "at least 1"),
        ("num_samples", num_samples > 0, "at least 1"),
    ):
        if not good:
            raise UserError(f"--{name} is out of range: {allowed}")


def main(f: flags.FlagValues) -> None:
    """Prints the samples."""
    host.cache_compilations(f.workdir)
    texts = sample(
        f.workdir,
        f.prompt,
        sampling=Sampling(f.temperature, f.top_k, f.top_p),
        max_new_tokens=f.max_new_tokens,
        num_samples=f.num_samples,
        seed=f.seed,
        checkpoint=f.checkpoint,
    )
    print(("\n" + "-" * 40 + "\n").join(texts))


if __name__ == "__main__":
    cli.define_workdir_flag()
    flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
    flags.DEFINE_float("temperature", 0.8, "0 takes the most probable token.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k most probable tokens; 0: from all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the tokens that hold this probability.")
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_integer("num_samples", 1, "How many continuations.")
    flags.DEFINE_integer("max_new_tokens", 400, "How many tokens to add at most.")
    flags.DEFINE_enum("checkpoint", "best", KINDS, "Which parameters.")
    cli.run(lambda: main(flags.FLAGS))
