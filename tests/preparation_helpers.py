"""Corpora to prepare, and the settings that name them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq

from nrgpt_jax.configs import default_config

TEXTS = [f"document {i} é " + "on and on " * (i % 7) + "\n" for i in range(400)]


def data_of(path, **fields):
    data = default_config().data
    data.update({"name": "openwebtext", "tokenizer": "byte", "path": str(path), **fields})
    return data


def write_lines(path, texts, field="text"):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({field: text}) + "\n" for text in texts)


def write_parquet(path, texts, field="text", group=50):
    pq.write_table(pa.table({field: texts, "id": list(range(len(texts)))}), path, group)
