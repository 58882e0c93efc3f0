"""Text of the models, measured: how many different words, how likely under another model."""

import numpy as np

from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.generation.engine import Settings, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import log_likelihood
from nrgpt_jax.runs.pretrained import Pretrained
from studies.tables import table

TEXTS, LENGTH, TEMPERATURE = 64, 127, 0.8  # characters after the first, a line break
Numbers = dict[str, float]
NAMES = {
    "distinct_1": "different words",
    "distinct_2": "different pairs of words",
    "known": "words that are in the training text",
    "perplexity": "perplexity a character, under the judge",
}


def distinct(texts: list[str], n: int) -> float:
    """The number of different n-grams of words over that of all (distinct-n)."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def texts_of(trained: Pretrained) -> list[np.ndarray]:
    """Token arrays that a model makes after a line break."""
    start = trained.tokenizer.encode("\n")
    settings = Settings(Sampling(temperature=TEMPERATURE))
    prompts = [np.array(start)] * TEXTS
    made = generate(trained.model, trained.variables, prompts, LENGTH, settings, seed=0)
    return [np.concatenate([start, new.tokens]) for new in made]


def real_texts(trained: Pretrained) -> list[np.ndarray]:
    """As many of the validation split, each from a line break on."""
    tokens = load_recorded(trained.config.data).validation.tokens
    [end] = trained.tokenizer.encode("\n")
    breaks = np.flatnonzero(tokens[: -LENGTH - 1] == end)
    chosen = breaks[np.linspace(0, len(breaks) - 1, TEXTS).astype(int)]
    return [tokens[at : at + LENGTH + 1] for at in chosen]


def measure(made: dict[str, list[np.ndarray]], judge: Pretrained) -> dict[str, Numbers]:
    """The numbers of the texts of each model."""
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
        }
    return found


def lines(found: dict[str, Numbers]) -> list[str]:
    """A row for each model, and one for the text of the corpus."""
    forms = {"distinct_1": ".3f", "distinct_2": ".3f", "known": ".1%", "perplexity": ".2f"}
    rows = [
        [name, *(f"{row[n]:{form}}" for n, form in forms.items())] for name, row in found.items()
    ]
    return table(["text of", *NAMES.values()], rows)
