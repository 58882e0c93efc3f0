"""Text data sets of the TFDS catalogue: `config.data.name = "tfds:ag_news_subset"`.

TFDS downloads and reads them. The documents of the train split are written once as JSON lines, then
tokenized and split into training and validation like any corpus.
"""

import json
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from nrgpt_jax import disk
from nrgpt_jax.datasets.places import cache_root, digest
from nrgpt_jax.errors import UserError, require

PREFIX = "tfds:"


def documents(name: str, field: str) -> Path:
    """Return the JSON lines file of a data set's documents; download and write it if missing.

    Args:
      name: the catalogue name, without `tfds:`: `NAME` or `NAME/CONFIG`.
      field: the text feature.

    Raises:
      UserError: the data set or the feature does not exist, or the download fails.
    """
    folder = cache_root() / "tfds"
    file = folder / f"{digest({'name': name, 'field': field})}.jsonl"
    if file.exists():
        return file
    try:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
        features = builder.info.features
        texts = [n for n, f in (features or {}).items() if isinstance(f, tfds.features.Text)]
        allowed = f"{PREFIX}{name} has the text features {', '.join(texts) or '(none)'}"
        require(field in texts, "data.field", field, allowed)
        builder.download_and_prepare()
        source: Any = builder.as_data_source(split="train")
    except UserError:
        raise
    except Exception as error:  # of the catalogue, a download, or a builder that needs TensorFlow
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.name={PREFIX}{name} is not possible: {reason}") from None
    with disk.replacing(file) as partial, partial.open("w", encoding="utf-8") as lines:
        for example in source:
            text = example[field].decode("utf-8", "replace")
            lines.write(json.dumps({field: text}) + "\n")
    return file
