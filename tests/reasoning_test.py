"""Generated tasks: their answers are right, and are what is learned."""

import numpy as np
import pytest

from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets import DATASETS, load_dataset
from nrgpt_jax.datasets.reasoning import TASKS
from nrgpt_jax.errors import UserError


def loaded(name, **options):
    config = default_config()
    config.data.name = name
    return load_dataset({**config.data, "options": {"num_train": 200, "num_test": 20, **options}})


def hops_of(words):
    """The symbol that a question leads to, by following it forward from each occurrence."""
    hops, letters = int(words[0]), words[1:]
    followed = {}  # by place: where its symbol occurred before, and one further
    last: dict[str, int] = {}
    for place, letter in enumerate(letters):
        followed[place] = last.get(letter, -2) + 1
        last[letter] = place
    place = len(letters) - 1
    for _ in range(hops):
        place = followed[place]
    return [letters[place]]


def sum_of(words):
    first, second = "".join(words).split("+")
    return [*reversed(str(int(first[::-1]) + int(second[::-1])))]


RIGHT = {
    "addition": sum_of,
    "parity": lambda words: [str(sum(map(int, words)) % 2)],
    "hops": hops_of,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right_and_alone_are_learned(name):
    found = loaded(name, trained=5, tested=(2, 7))
    assert len(loaded(name).prompts) > 0, "the default difficulties are possible"
    assert found.fingerprint != loaded(name, trained=5, tested=(2, 7), seed=1).fingerprint
    assert list(found.prompts) == [f"{name}_2", f"{name}_7"]
    words = lambda tokens: found.tokenizer.decode(tokens).split(",")
    for prompts in found.prompts.values():
        for prompt, answer in zip(prompts.prompts, prompts.answers, strict=True):
            *question, end = words(prompt)
            assert end == "="
            assert RIGHT[name](question) == words(answer)
            assert (prompts.score(answer, answer), prompts.score(prompt, answer)) == (1, 0)
    tokens, weights = found.train.read(0, len(found.train))
    ends = np.flatnonzero(tokens == prompts.end) + 1
    for sample, learned in zip(np.split(tokens, ends), np.split(weights, ends), strict=True):
        expected = np.cumsum(sample == prompts.prompts[0][-1]) > (sample == prompts.prompts[0][-1])
        np.testing.assert_array_equal(learned, expected)


def test_the_longest_is_as_hard_as_is_said():
    prompts = loaded("addition", tested=(9,)).prompts["addition_9"].prompts
    plus = loaded("addition").tokenizer.encode("+")[0]
    sides = [np.split(prompt[:-1], np.flatnonzero(prompt == plus)) for prompt in prompts]
    assert all(max(len(first), len(second) - 1) == 9 for first, second in sides)


@pytest.mark.parametrize(
    ("name", "options"), [("hops", {"trained": 10}), ("parity", {"tested": (0,)})]
)
def test_impossible_difficulties_are_refused(name, options):
    assert name in DATASETS
    with pytest.raises(UserError):
        loaded(name, **options)
