"""Continue tokens greedily with an exported model. Needs jax, flatbuffers and safetensors.

    python usage.py 1,2,3 20

prints 20 tokens that follow the tokens 1, 2 and 3; `tokenizer.json` defines their text.
"""

import sys
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from safetensors.numpy import load_file


def read_parameters(path: Path) -> dict[str, np.ndarray]:
    """Load the parameters by name."""
    return load_file(path)


def read_function(path: Path) -> jax.export.Exported:
    """Load an exported function."""
    return jax.export.deserialize(bytearray(path.read_bytes()))


def fail(message: str) -> NoReturn:
    """Exit with a one-line error message."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def opened(read, path: Path):
    """Return `read(path)`; exit if the file is missing or damaged."""
    try:
        return read(path)
    except Exception as error:  # flatbuffers, MLIR and safetensors raise different types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fail(f"{path} cannot be read ({reason}); export the run again")


def main(folder: Path, prompt: list[int], count: int) -> None:
    """Print the new tokens, separated by commas."""
    params = opened(read_parameters, folder / "model.safetensors")
    prefill = opened(read_function, folder / "prefill.jax_export")
    decode = opened(read_function, folder / "decode.jax_export")
    expected = dict(zip(sorted(params), prefill.in_avals[:-2], strict=False))
    same = len(expected) == len(params) == len(prefill.in_avals) - 2
    if not same or any(params[name].shape != aval.shape for name, aval in expected.items()):
        fail(f"the files in {folder} are of several exports; export again")
    context_length, vocab_size = prefill.in_avals[-2].shape[1], prefill.out_avals[0].shape[1]
    if not 0 < len(prompt) <= context_length - count or count < 0:
        fail(f"prompt and new tokens must fit {context_length} tokens")
    if not all(0 <= token < vocab_size for token in prompt):
        fail(f"tokens are numbers from 0 to {vocab_size - 1}")
    tokens = np.zeros((1, context_length), np.int32)
    tokens[0, : len(prompt)] = prompt
    logits, cache = prefill.call(params, tokens, np.array([len(prompt)], np.int32))
    step, new = jax.jit(decode.call), []
    for position in range(len(prompt), len(prompt) + count):
        new.append(int(logits[0].argmax()))
        token, at = (np.array([number], np.int32) for number in (new[-1], position))
        logits, cache = step(params, token, at, cache)
    print(",".join(map(str, new)))


def arguments(words: list[str]) -> tuple[list[int], int]:
    """Parse the prompt and the number of new tokens."""
    try:
        prompt, count = words
        return [int(token) for token in prompt.split(",")], int(count)
    except ValueError:
        fail("give tokens and how many to add: usage.py 1,2,3 20")


if __name__ == "__main__":
    main(Path(__file__).parent, *arguments(sys.argv[1:]))
