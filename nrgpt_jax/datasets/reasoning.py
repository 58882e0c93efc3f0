"""Generated tasks with a numeric difficulty: addition, parity, and p-hop induction.

    3,5,+,8,4,=,1,0,1,<eos>         53 + 48 = 101, the least significant digit first
    1,0,1,1,=,1,<eos>               the parity of the bits
    2,c,a,b,c,a,c,=,b,<eos>         two hops: a followed c, and b followed a

Training samples have random difficulties up to a limit; each set of prompts has one difficulty,
which may exceed the limit. The loss is on answers only. A hop goes from a symbol to the one that
followed its previous occurrence (Sanford et al. 2024, arXiv 2402.09268).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nrgpt_jax.datasets.places import digest
from nrgpt_jax.datasets.streams import Dataset, Prompts, Stream
from nrgpt_jax.datasets.tokenizers import EOS, SymbolTokenizer
from nrgpt_jax.errors import UserError

ANSWER = "="
Sample = Callable[[random.Random, int], tuple[list[str], list[str]]]
"""A function `(rng, difficulty) -> (question, answer)`."""

DIGITS, BITS, LETTERS = "0123456789", "01", "abcd"


def add(rng: random.Random, digits: int) -> tuple[list[str], list[str]]:
    """Sample the sum of two numbers, the longer one of `digits` digits."""
    lengths = [digits, rng.randint(1, digits)]
    rng.shuffle(lengths)
    first, second = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in lengths)
    write = lambda number: [*reversed(str(number))]
    return [*write(first), "+", *write(second)], write(first + second)


def parity(rng: random.Random, bits: int) -> tuple[list[str], list[str]]:
    """Sample the parity of `bits` bits: 1 if the number of ones is odd."""
    drawn = rng.choices(BITS, k=bits)
    return drawn, [str(drawn.count("1") % 2)]


def hop(rng: random.Random, hops: int, length: int = 24) -> tuple[list[str], list[str]]:
    """Sample the symbol `hops` hops from the last of `length`, redrawn until all hops exist."""
    while True:
        letters = rng.choices(LETTERS, k=length)
        at = length - 1
        for _ in range(hops):
            before = [i for i in range(at) if letters[i] == letters[at]]
            if not before:
                break
            at = before[-1] + 1
        else:
            return [str(hops), *letters], [letters[at]]


TASKS: Mapping[str, tuple[Sample, Sequence[str]]] = {
    "addition": (add, [*DIGITS, "+"]),
    "parity": (parity, BITS),
    "hops": (hop, [*DIGITS[1:], *LETTERS]),
}


def load(
    data: Mapping[str, Any],
    *,
    trained: int = 5,
    tested: tuple[int, ...] = (5, 7, 9),
    num_train: int = 50_000,
    num_test: int = 500,
    seed: int = 0,
) -> Dataset:
    """Generate the task `data["name"]`.

    Args:
      data: `config.data`.
      trained: maximum difficulty in training: digits, bits or hops.
      tested: difficulties of prompts, named `<task>_<difficulty>`.
      num_train: number of samples; the last `data.validation_fraction` are the validation split.
      num_test: number of prompts per tested difficulty.
      seed: seed of the generator.

    Raises:
      UserError: a difficulty is below 1 or above the maximum: 9 hops (one digit), else 10,000.
    """
    name = data["name"]
    sample, symbols = TASKS[name]
    most = 9 if name == "hops" else 10_000
    if not all(1 <= n <= most for n in (trained, *tested)):
        raise UserError(f"data.options.trained={trained}, tested={tested}: from 1 to {most}")
    rng, tokenizer = random.Random(seed), SymbolTokenizer([EOS, ANSWER, *symbols])
    encode = lambda words: tokenizer.encode(",".join(words))
    [end] = encode([EOS])
    prompts = {}
    for difficulty in tested:
        drawn = [sample(rng, difficulty) for _ in range(num_test)]
        sides = [encode([*q, ANSWER]) for q, _ in drawn], [encode(answer) for _, answer in drawn]
        prompts[f"{name}_{difficulty}"] = Prompts(*sides, int(end), tokenizer.size, exactly)
    tokens, weights = [], []
    for _ in range(num_train):
        question, answer = sample(rng, rng.randint(1, trained))
        tokens.append(encode([*question, ANSWER, *answer, EOS]))
        weights.append(np.arange(len(tokens[-1])) > len(question))
    count = round(num_train * (1.0 - data["validation_fraction"]))
    split = lambda part: Stream.of(
        np.concatenate(tokens[part]), np.concatenate(weights[part]).astype(np.float32)
    )
    content = [name, trained, tested, num_train, num_test, seed, data["validation_fraction"]]
    fingerprint = digest({"content": content})
    train, validation = split(slice(count)), split(slice(count, None))
    return Dataset(train, validation, tokenizer, prompts, fingerprint)


def exactly(new: np.ndarray, answer: np.ndarray) -> float:
    """Return 1 if the new tokens equal the answer, else 0."""
    return float(np.array_equal(new, answer))
