"""Continue prompts with a trained model.

    python -m nrgpt_jax.sample --workdir=DIR --prompt="ROMEO:" [--temperature=0.8] [--top_k=40]
        [--cache=fixed_point] [--until_converged --tolerance=1e-3 --max_steps=48] [--format=jsonl]

DIR is a run directory or a folder written by `nrgpt_jax.export`. `--help` lists all flags.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from nrgpt_jax import cli, host
from nrgpt_jax.core.block import CACHES
from nrgpt_jax.core.descent import CRITERIA, Convergence
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.generation import generate as generation
from nrgpt_jax.generation import scoring
from nrgpt_jax.generation.generate import Continuation, Settings
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.runs.checkpoints import KINDS
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained

RULE = "\n" + "-" * 40 + "\n"
MOST_SAMPLES = 2**16  # per prompt
MOST_BYTES = 64 * 2**20  # of a prompts file
MORE_STEPS = 4  # default limit until convergence, as a multiple of the steps in training


class Sample(NamedTuple):
    """A prompt and its continuation."""

    prompt: np.ndarray  # (n,) tokens
    new: Continuation


def sample(
    workdir: Path | str,
    prompts: str | Sequence[str],
    settings: Settings = Settings(),  # noqa: B008 (immutable)
    *,
    max_new_tokens: int = 400,
    num_samples: int = 1,
    seed: int = 0,
    checkpoint: str = "best",
) -> list[str]:
    """Sample continuations of prompts; return prompts with continuations, as text.

    Args:
      workdir: a run directory or an exported folder.
      prompts: one or several prompts.
      settings: generation settings.
      max_new_tokens: largest number of new tokens per continuation.
      num_samples: number of continuations per prompt.
      seed: seed of the sampling.
      checkpoint: checkpoint of a run directory, `best` or `latest`.

    Raises:
      UserError: a prompt is empty or has symbols outside the vocabulary, a setting is out of
        range, or the run does not exist.
    """
    trained = load_pretrained(workdir, checkpoint)
    starts = _encode(trained, [prompts] if isinstance(prompts, str) else prompts, num_samples)
    new = generation.generate(
        trained.model,
        trained.variables,
        starts,
        max_new_tokens,
        settings,
        seed=seed,
        **_vocabulary(trained),
    )
    decode = trained.tokenizer.decode
    return [decode([*start, *n.tokens]) for start, n in zip(starts, new, strict=True)]


def _encode(trained: Pretrained, prompts: Sequence[str], num_samples: int) -> list[np.ndarray]:
    allowed = f"between 1 and {MOST_SAMPLES:,}"
    require(0 < num_samples <= MOST_SAMPLES, "num_samples", num_samples, allowed)
    starts = [trained.tokenizer.encode(prompt) for prompt in prompts]
    if not all(len(start) for start in starts):
        raise UserError("a prompt is empty; give at least one token: --prompt=...")
    return [start for start in starts for _ in range(num_samples)]


def _vocabulary(trained: Pretrained) -> dict[str, Any]:
    return {"num_symbols": trained.tokenizer.size, "end_token": trained.tokenizer.end}


# The program ------------------------------------------------------------------------------------


def _settings(f: flags.FlagValues, trained_steps: int) -> Settings:
    stopping, num_steps = None, f.num_steps
    if f.until_converged:
        if f.num_steps is not None:
            raise UserError("--until_converged takes --max_steps, not --num_steps")
        values = {"tolerance": f.tolerance, "criterion": f.criterion}
        stopping = Convergence(**{name: v for name, v in values.items() if v is not None})
        num_steps = MORE_STEPS * trained_steps if f.max_steps is None else f.max_steps
    for name in ("tolerance", "criterion", "max_steps"):
        if getattr(f, name) is not None and not f.until_converged:
            raise UserError(f"--{name} is for --until_converged")
    if f.stride is not None and f.overflow == "refuse":
        raise UserError("--stride is for --overflow=slide")
    sampling = Sampling(f.temperature, f.top_k, f.top_p, f.min_p, f.repetition_penalty)
    return Settings(sampling, f.cache, num_steps, stopping, f.overflow, f.stride)


def _prompts(f: flags.FlagValues) -> list[str]:
    if (f.prompt is None) == (f.prompts_file is None):
        raise UserError("give --prompt=TEXT or --prompts_file=FILE (one prompt a line)")
    if f.prompt is not None:
        return [f.prompt]
    lines = re.split("\r?\n", _read_prompts(f.prompts_file))
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{f.prompts_file} holds no prompt; one a line is wanted")
    return prompts


def _read_prompts(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES:,} bytes; give a part at a time")
        return content.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (at byte {error.start:,}); convert it") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}); name a file of prompts") from None


def main(f: flags.FlagValues) -> None:
    """Print samples during generation, and statistics to stderr."""
    host.cache_compilations(f.workdir)
    prompts = _prompts(f)
    trained = load_pretrained(f.workdir, f.checkpoint)
    settings = _settings(f, trained.model.num_steps)
    generation.check_settings(trained.model, settings)
    starts = _encode(trained, prompts, f.num_samples)
    longest, length = max(map(len, starts)), trained.model.context_length
    if longest > length and settings.overflow == "slide":
        _print_note(f"a prompt has {longest} tokens; its last {length} are read")
    _say_cache(trained, starts, f.max_new_tokens, settings)
    pieces = generation.stream(
        trained.model,
        trained.variables,
        starts,
        f.max_new_tokens,
        settings,
        seed=f.seed,
        **_vocabulary(trained),
    )
    live = f.format == "text" and len(starts) == 1
    samples = _collect(
        pieces, starts, _printer(trained, starts[0]) if live else lambda new, complete: None
    )
    if live:
        print()
    elif f.format == "text":
        print(RULE.join(trained.tokenizer.decode([*s.prompt, *s.new.tokens]) for s in samples))
    else:
        for one in samples:
            print(json.dumps(_record(trained, one, settings)))
    _report(trained, samples, settings)


def _collect(pieces: Iterator[list[Continuation]], starts, see) -> list[Sample]:
    parts: list[list[Continuation]] = [[] for _ in starts]
    for piece in pieces:
        for part, new in zip(parts, piece, strict=True):
            part.append(new)
        see(parts[0], False)
    see(parts[0], True)
    complete = [Continuation(*map(np.concatenate, zip(*part, strict=True))) for part in parts]
    return [Sample(start, new) for start, new in zip(starts, complete, strict=True)]


def _printer(trained: Pretrained, start):
    """Return a function that prints the prompt, then the new text in each call."""
    printed = ""

    def see(parts: list[Continuation], complete: bool) -> None:
        nonlocal printed
        tokens = [t for part in parts for t in part.tokens]
        text = trained.tokenizer.decode([*start, *tokens])
        text = text if complete else text.rstrip("\ufffd")  # possibly a partial character
        print(text[len(printed) :], end="", flush=True)
        printed = text

    return see


def _record(trained: Pretrained, one: Sample, settings: Settings) -> dict[str, Any]:
    """Return the record of a sample, a line of --format=jsonl."""
    decode, start, new = trained.tokenizer.decode, one.prompt, one.new
    record = {
        "prompt": decode(start),
        "text": decode([*start, *new.tokens]),
        "tokens": [decode([t]) for t in new.tokens],
        "log_probs": [round(float(x), 6) for x in new.log_probs],
        "steps": new.steps.tolist(),
    }
    if trained.model.has_energy:
        complete = np.concatenate([start, new.tokens])
        model, variables = _as_deep(trained, settings)
        energies = scoring.token_energies(model, variables, complete)[len(start) :]
        record["energies"] = [round(float(x), 6) for x in energies]
    return record


def _as_deep(trained: Pretrained, settings: Settings):
    steps = settings.num_steps or trained.model.num_steps
    return trained.model.with_num_steps(trained.variables, steps)


def _say_cache(trained: Pretrained, starts, max_new_tokens: int, settings: Settings) -> None:
    generation.check_settings(trained.model, settings)
    model, variables = _as_deep(trained, settings)
    slots = generation.slots_for(model, starts, max_new_tokens)
    size = generation.cache_bytes(model, variables, len(starts), slots, settings.cache) / 1e6
    _print_note(f"KV cache: {settings.cache}, {size:.2f} MB for {len(starts)} x {slots} tokens")


def _report(trained: Pretrained, samples: list[Sample], settings: Settings) -> None:
    """Print the steps per token, and the error of an approximate cache."""
    model, variables = _as_deep(trained, settings)
    if settings.stopping is not None:
        steps = np.concatenate([s.new.steps for s in samples])
        if len(steps):
            spread = (
                f"mean {steps.mean():.1f}, median {np.median(steps):.0f}, largest {steps.max()}"
            )
            _print_note(f"steps per token: {spread} (limit {model.num_steps})")
    if settings.cache == "fixed_point":
        one = max(samples, key=lambda s: len(s.new.tokens))
        complete = np.concatenate([one.prompt, one.new.tokens])
        error = scoring.cache_error(
            model,
            variables,
            complete,
            len(one.prompt),
            Decoding(settings.cache, settings.stopping),
            trained.tokenizer.size,
        )
        _print_note(
            f"compared with the exact cache: logits differ by at most {error.largest:.3g}, KL "
            f"{error.divergence:.3g} nats a token, same most probable token {error.agreement:.1%}"
        )


def _print_note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _define_flags() -> None:
    cli.define_workdir_flag()
    flags.DEFINE_string("prompt", None, "Text to continue.")
    flags.DEFINE_string("prompts_file", None, "A file with one prompt a line.")
    flags.DEFINE_enum("format", "text", ("text", "jsonl"), "Text, or one JSON object a sample.")
    flags.DEFINE_integer("max_new_tokens", 400, "How many tokens to add at most.")
    flags.DEFINE_integer("num_samples", 1, "How many continuations of each prompt.")
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_float("temperature", 0.8, "0 takes the most probable token.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k most probable tokens; 0: from all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the tokens that hold this probability.")
    flags.DEFINE_float("min_p", 0.0, "Draw from tokens this times as probable as the first.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens in the context are rarer.")
    flags.DEFINE_enum("cache", "exact", CACHES, "One state a token and step, or one a token.")
    flags.DEFINE_integer("num_steps", None, "Steps of the descent; as in training by default.")
    flags.DEFINE_boolean("until_converged", False, "A token stops when it has converged.")
    flags.DEFINE_float("tolerance", None, "Of --until_converged; 1e-3.")
    flags.DEFINE_enum(
        "criterion",
        None,
        CRITERIA,
        "Change of the energy (the default), its gradient, or change of the state.",
    )
    flags.DEFINE_integer("max_steps", None, "Of --until_converged; 4 times those of training.")
    flags.DEFINE_enum(
        "overflow", "slide", generation.OVERFLOWS, "At the context length: forget, or refuse."
    )
    flags.DEFINE_integer("stride", None, "Tokens forgotten at once; half of the context length.")
    flags.DEFINE_enum("checkpoint", "best", KINDS, "Which parameters of a run.")


if __name__ == "__main__":
    _define_flags()
    cli.run(lambda: main(flags.FLAGS))
