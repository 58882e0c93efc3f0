"""Export a trained model as one folder, for use with or without this package.

    python -m nrgpt_jax.export --workdir=DIR --out=FOLDER [--cache=fixed_point] [--num_steps=N]

FOLDER gets `model.safetensors`, `config.json` and `tokenizer.json`, which `load_pretrained` and
`nrgpt_jax.sample --workdir=FOLDER` read, and `checksums.json`, by which they verify all files. It
also gets two compiled functions, serialized by `jax.export` for CPUs, NVIDIA GPUs and TPUs. They
need jax and flatbuffers, not this package:

    prefill(params, tokens (b,N), lengths (b,)) -> logits (b,V), cache
    decode(params, tokens (b,), positions (b,), cache) -> logits (b,V), cache

for any batch size b, context length N and vocabulary size V of the tokenizer. `usage.py` in FOLDER
is a complete program that uses them.
"""

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from absl import flags
from flax import traverse_util

from nrgpt_jax import cli, disk
from nrgpt_jax.core.block import CACHES
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation import exported
from nrgpt_jax.generation.generate import Settings, check_settings
from nrgpt_jax.generation.sampling import of_symbols
from nrgpt_jax.models import abstract_params
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.runs import checksums
from nrgpt_jax.runs.checkpoints import KINDS
from nrgpt_jax.runs.pretrained import SAVED, Pretrained, load_pretrained, save_pretrained

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    pretrained: Pretrained,
    folder: Path | str,
    cache: str = "exact",
    num_steps: int | None = None,
    functions: bool = True,
) -> None:
    """Write the exported folder.

    Args:
      pretrained: model to export.
      folder: output folder; created if needed.
      cache: KV cache of the compiled functions, `exact` or `fixed_point`.
      num_steps: number of recurrent steps of the compiled functions; None: as in training.
      functions: whether to write the compiled functions, besides the files for this package.

    Raises:
      UserError: the model does not support an option, or the folder contains a run.
      OSError: the folder cannot be written.
    """
    check_settings(pretrained.model, Settings(cache=cache, num_steps=num_steps))
    folder = Path(folder)
    save_pretrained(folder, pretrained)
    if not functions:
        return
    extra = {"usage.py": Path(exported.__file__).read_bytes()}
    for name, function in compiled_functions(pretrained, cache, num_steps).items():
        extra[f"{name}.jax_export"] = bytes(function.serialize())
    for name, content in extra.items():
        disk.write_whole(folder / name, content)
    checksums.write(folder, (*SAVED, *extra))


def compiled_functions(
    pretrained: Pretrained, cache: str = "exact", num_steps: int | None = None
) -> dict[str, jax.export.Exported]:
    """Export `prefill` and `decode` for any batch size; parameters are a flat dict by path."""
    deep = num_steps or pretrained.model.num_steps
    trained = pretrained.model.with_implementation("blocked")  # runs on every platform
    model, _ = trained.with_num_steps(pretrained.variables, deep)
    apply, decoding = cast(Any, model.apply), Decoding(cache)
    slots = pretrained.model.context_length

    def variables_of(flat):
        nested = {"params": traverse_util.unflatten_dict(flat, sep="/")}
        return trained.with_num_steps(nested, deep)[1]

    def of_logits(logits, cache_now, steps):
        del steps
        return of_symbols(logits, pretrained.tokenizer.size), cache_now

    def prefill(flat, tokens, lengths):
        variables = variables_of(flat)
        cache_now = apply(variables, tokens.shape[0], slots, cache, method=model.empty_cache)
        arguments = variables, tokens, lengths, cache_now, decoding
        return of_logits(*apply(*arguments, method=model.prefill))

    def decode(flat, tokens, positions, cache_now):
        arguments = variables_of(flat), tokens, positions, cache_now, decoding
        return of_logits(*apply(*arguments, method=model.decode))

    (batch,) = jax.export.symbolic_shape("b")
    shapes = traverse_util.flatten_dict(abstract_params(pretrained.model), sep="/")
    tokens = jax.ShapeDtypeStruct((batch, slots), jnp.int32)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    one = jax.export.export(jax.jit(prefill), platforms=PLATFORMS)(shapes, tokens, row)
    cache_shape = jax.tree.unflatten(one.out_tree, one.out_avals)[1]
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache_shape)
    two = jax.export.export(jax.jit(decode), platforms=PLATFORMS)(shapes, row, row, like)
    return {"prefill": one, "decode": two}


def main(f: flags.FlagValues) -> None:
    """Export, and print the files with their sizes."""
    if Path(f.out).resolve() == Path(f.workdir).resolve():
        raise UserError("--out is the --workdir; name another folder")
    export(load_pretrained(f.workdir, f.checkpoint), f.out, f.cache, f.num_steps, f.functions)
    for path in sorted(Path(f.out).iterdir()):
        print(f"{path.stat().st_size / 1e6:9.2f} MB  {path}")


if __name__ == "__main__":
    cli.define_workdir_flag()
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_enum("cache", "exact", CACHES, "Of the compiled functions.")
    flags.DEFINE_integer("num_steps", None, "Of the compiled functions; as in training.")
    flags.DEFINE_boolean("functions", True, "Write compiled functions too.")
    flags.DEFINE_enum("checkpoint", "best", KINDS, "Which parameters of a run.")
    cli.run(lambda: main(flags.FLAGS))
