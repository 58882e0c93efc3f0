"""Data sets of the TFDS catalogue: their text is read as documents are."""

import importlib
import sys

import pytest
from preparation_helpers import data_of

from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.datasets.data_checks import check_data
from nrgpt_jax.errors import UserError

OWN = """
import tensorflow_datasets as tfds


class OwnTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text, label = tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
        features = tfds.features.FeaturesDict({"story": text, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"story": f"story {number} é", "label": number % 2}
"""


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """A data set in a package, as TFDS finds them."""
    root = tmp_path_factory.mktemp("catalogue")
    folder = root / "own_catalogue/own_texts"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("from own_catalogue.own_texts.own_texts import OwnTexts\n")
    (folder / "own_texts.py").write_text(OWN)
    sys.path.insert(0, str(root))
    yield importlib.import_module("own_catalogue.own_texts")
    sys.path.remove(str(root))


def test_its_documents_are_those_of_the_train_split(catalogue):
    data = data_of("", name="tfds:own_texts", tokenizer="byte", field="story")
    check_data(data)
    found = load_dataset(data)
    text = "".join(found.tokenizer.decode(s.tokens) for s in (found.train, found.validation))
    assert sorted(text.split("\n")) == sorted(["", *(f"story {n} é" for n in range(30))])
    assert load_dataset(data).fingerprint == found.fingerprint


def test_mistakes_are_one_line(catalogue):
    for changes, word in (({"field": "label"}, "story"), ({"name": "tfds:no_such_texts"}, "tfds:")):
        fields = {"name": "tfds:own_texts", "field": "story", "tokenizer": "byte", **changes}
        with pytest.raises(UserError, match=word) as error:
            load_dataset(data_of("", **fields))
        assert "\n" not in str(error.value)
