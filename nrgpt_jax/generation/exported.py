"""Continues tokens greedily with an exported model. Needs jax, flatbuffers and safetensors.

    python usage.py 1,2,3 20

prints 20 tokens that follow the tokens 1, 2 and 3; `tokenizer.json` says what they stand for.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file


def main(folder: Path, prompt: list[int], count: int) -> None:
    """Prints the tokens, comma separated."""
    params = load_file(folder / "model.safetensors")
    read = lambda name: jax.export.deserialize(
        bytearray((folder / f"{name}.jax_export").read_bytes())
    )
    prefill, decode = read("prefill"), read("decode")
    context_length = prefill.in_avals[-2].shape[1]
    if not 0 < len(prompt) <= context_length - count:
        raise SystemExit(f"error: prompt and new tokens must fit {context_length} tokens")
    tokens = np.zeros((1, context_length), np.int32)
    tokens[0, : len(prompt)] = prompt
    logits, cache = prefill.call(params, tokens, np.array([len(prompt)], np.int32))
    step, new = jax.jit(decode.call), []
    for position in range(len(prompt), len(prompt) + count):
        new.append(int(logits[0].argmax()))
        token, at = (np.array([number], np.int32) for number in (new[-1], position))
        logits, cache = step(params, token, at, cache)
    print(",".join(map(str, new)))


if __name__ == "__main__":
    main(Path(__file__).parent, [int(t) for t in sys.argv[1].split(",")], int(sys.argv[2]))
