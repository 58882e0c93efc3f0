"""ListOps: nested operations on digits, with every step of their simplification.

    add_10,(,0,median_10,(,1,7,1,),2,),=,add_10,(,0,1,2,),=,3,<eos>

An expression, then each simplification (the deepest first-found operation replaced by its
value), then the answer. The argument tuples of the exclusion set never occur in training; every
held-out sample contains one of them in its expression or in its simplifications.
No library generates such samples; they are prepared like a corpus of a single part.
Source: the ListOps task of NRGPT (arXiv 2512.16762), and the data of its release.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nrgpt_jax.datasets import shards
from nrgpt_jax.datasets.documents import Document
from nrgpt_jax.datasets.parts import Part
from nrgpt_jax.datasets.places import cache_root, digest
from nrgpt_jax.datasets.preparation import Plan
from nrgpt_jax.datasets.preparation import prepare as _prepare
from nrgpt_jax.datasets.tokenizers import EOS, SymbolTokenizer
from nrgpt_jax.errors import UserError

STEP = "="
MOST_MISSES = 100_000  # consecutive rejected expressions
PUNCTUATION = (EOS, "(", ")", STEP)

OPERATIONS: Mapping[str, Callable[[list[int]], int]] = {
    "min": min,
    "max": max,
    "median": lambda args: sorted(args)[len(args) // 2],
    "add": sum,
    "prod": math.prod,
    "nadd": lambda args: sum(args[::2]) - sum(args[1::2]),
}

Expression = int | tuple[str, list["Expression"]]


def tokenizer(settings: Mapping[str, Any]) -> SymbolTokenizer:
    """Return the tokenizer of all symbols: punctuation, operations (also unused ones), digits."""
    modulus = settings["modulus"]
    names = [_symbol(operation, modulus) for operation in OPERATIONS]
    return SymbolTokenizer([*PUNCTUATION, *names, *map(str, range(modulus))])


def prepare(settings: Mapping[str, Any]) -> Path:
    """Return the folder of `config.data.listops`'s prepared tokens; prepare them if missing.

    Splits are `train`, `test` and `test_<operation>`.
    """
    content = {name: value for name, value in settings.items() if name != "learn_questions"}
    name = digest(content)
    splits = ("train", "test", *(f"test_{op}" for op in dict.fromkeys(content["operations"])))
    part = Part(0, splits, functools.partial(_samples, content), [name])
    folder = cache_root() / "listops" / name / shards.VERSION
    _prepare(folder, "listops", lambda: Plan([part], tokenizer(content), name), workers=1)
    return folder


def _samples(settings: Mapping[str, Any]) -> Iterator[tuple[str, Document]]:
    generator, operations = Generator(settings), tuple(settings["operations"])
    drawn = {f"test_{name}": (settings["num_test"], True, (name,)) for name in operations}
    drawn["test"] = settings["num_test"], True, operations
    drawn["train"] = settings["num_train"], False, operations
    for split, choice in drawn.items():
        for number, symbols in enumerate(generator.samples(*choice)):
            yield split, Document(split, number, iter([",".join(symbols)]), ends=False)


class Generator:
    """A random generator of expressions, deterministic given its settings."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self.random = random.Random(settings["seed"])
        self.exclusions = self._draw_exclusions()

    def _draw_exclusions(self) -> set[tuple[str, ...]]:
        digits = [str(d) for d in range(self.settings["modulus"])]
        length = self.settings["max_arguments"]
        count = int(len(digits) ** length * self.settings["exclusion_rate"])
        if length > len(digits):
            return {tuple(self.random.choices(digits, k=length)) for _ in range(count)}
        return {tuple(self.random.sample(digits, length)) for _ in range(count)}

    def expression(self, operations: tuple[str, ...], depth: int = 1) -> Expression:
        """Draw an operation whose arguments are digits or, up to the full depth, operations."""
        s, rng = self.settings, self.random
        operation = rng.choice(operations)
        arguments: list[Expression] = []
        for _ in range(rng.randint(s["min_arguments"], s["max_arguments"])):
            nest = rng.random() < s["function_probability"] and depth < s["depth"]
            digit = rng.randrange(s["modulus"])
            arguments.append(self.expression(operations, depth + 1) if nest else digit)
        return operation, arguments

    def samples(
        self, count: int, held_out: bool, operations: tuple[str, ...]
    ) -> Iterator[list[str]]:
        """Yield `count` solutions that do (`held_out`) or do not contain an excluded tuple."""
        misses = 0
        while count > 0:
            symbols = solution(self.expression(operations), self.settings["modulus"])
            if self.is_excluded(symbols) == held_out:
                count, misses = count - 1, 0
                yield symbols
            elif (misses := misses + 1) > MOST_MISSES:
                kind = "contain" if held_out else "avoid"
                raise UserError(
                    f"data.listops.exclusion_rate={self.settings['exclusion_rate']}: expressions "
                    f"that {kind} an excluded tuple do not come up; choose another rate"
                )

    def is_excluded(self, symbols: list[str]) -> bool:
        """Return whether the symbols contain an excluded tuple."""
        runs = [symbols[i:] for i in range(self.settings["max_arguments"])]
        return any(run in self.exclusions for run in zip(*runs, strict=False))


def solution(expression: Expression, modulus: int) -> list[str]:
    """Return the symbols of an expression, its simplifications, its answer and the end token."""
    steps = [_write(expression, modulus)]
    while not isinstance(expression, int):
        expression = _simplify(expression, modulus)
        steps.append(_write(expression, modulus))
    return [*itertools.chain(*[[*step, STEP] for step in steps[:-1]]), *steps[-1], EOS]


def _simplify(expression: Expression, modulus: int) -> Expression:
    """Replace the deepest first-found operation by its value."""
    if isinstance(expression, int):
        return expression
    operation, arguments = expression
    digits: list[int] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, int):
            digits.append(argument)
        else:
            return operation, [*arguments[:i], _simplify(argument, modulus), *arguments[i + 1 :]]
    return OPERATIONS[operation](digits) % modulus


def _write(expression: Expression, modulus: int) -> list[str]:
    if isinstance(expression, int):
        return [str(expression)]
    operation, arguments = expression
    inner = itertools.chain(*(_write(argument, modulus) for argument in arguments))
    return [_symbol(operation, modulus), "(", *inner, ")"]


def _symbol(operation: str, modulus: int) -> str:
    return f"{operation}_{modulus}"
