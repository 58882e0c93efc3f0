"""Prepared data: a TFDS data set whose shards are written one by one, each whole or not at all.

A data set lies in `NAME/KEY/VERSION` below the cache folder. KEY changes with all that the tokens
depend on, VERSION with the layout. A part of the corpus becomes one shard of each split that it
feeds; `progress/PART.json` says that they are there, and what they hold. `dataset_info.json` is
written last: without it a data set is not complete, and preparing it resumes.
"""

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from nrgpt_jax.datasets import tokenizers
from nrgpt_jax.datasets.records import unwritable
from nrgpt_jax.datasets.streams import Shard
from nrgpt_jax.errors import UserError

VERSION = "2.0.0"
RECORD_TOKENS = 4096  # a window of 1,025 touches one record, sometimes two
INFO, METADATA = "dataset_info.json", "metadata.json"
REMAKE = (
    f"remove {INFO} there and prepare the data again: only what is incomplete is computed again"
)


class Written(NamedTuple):
    """What a shard holds."""

    tokens: int
    records: int
    bytes: int
    checksum: int
    documents: int
    skipped: int = 0  # documents that have no text


Name = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*$")]
"""Of a data set or a split: part of a file's name, which cannot lead out of its folder."""
Count = Annotated[int, msgspec.Meta(ge=0)]


class WrittenRecord(msgspec.Struct):
    """What `metadata.json` keeps of a `Written`."""

    tokens: Count
    bytes: Count


class Metadata(msgspec.Struct):
    """What is read of `metadata.json`."""

    shards: dict[Name, list[WrittenRecord]]
    dtype: Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"]
    record_tokens: Annotated[int, msgspec.Meta(gt=0)]
    tokenizer: tokenizers.Record
    fingerprint: str


class Info(msgspec.Struct):
    """What is read of `dataset_info.json`."""

    name: Name


class Layout(NamedTuple):
    """Where the shards of a data set are, and how many each split has."""

    folder: Path
    name: str
    counts: Mapping[str, int]  # shards by split

    def shard(self, split: str, index: int) -> Path:
        """The path of a shard, as TFDS names it."""
        of = f"{index:05d}-of-{self.counts[split]:05d}"
        return self.folder / f"{self.name}-{split}.array_record-{of}"

    def progress(self, part: int) -> Path:
        """The record of a part of the corpus that is written."""
        return self.folder / "progress" / f"{part:05d}.json"


def features_of(dtype: np.dtype):
    """The TFDS features of a record: up to RECORD_TOKENS tokens."""
    import tensorflow_datasets as tfds

    encoding = tfds.features.Encoding.BYTES
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.dtype(dtype), encoding=encoding)
    return tfds.features.FeaturesDict({"tokens": tokens})


def _partial(path: Path) -> Path:
    """Where a file is until it is whole; workers on several machines may have the same number."""
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what array_record says of a full disk into one line."""
    try:
        yield
    except RuntimeError as error:
        raise unwritable(error, path) from None


class ShardWriter:
    """Writes one shard; it appears under its name when it is whole.

    Raises:
      UserError: it cannot be written, such as on a full disk.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        from array_record.python import array_record_module
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._path, self._partial = path, _partial(path)
        self._dtype, self._features = dtype, features_of(dtype)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        options = "group_size:1,uncompressed"
        with _writing(path):
            self._writer = array_record_module.ArrayRecordWriter(str(self._partial), options)
        self._chunks: list[np.ndarray] = []
        self._waiting = self.tokens = self.records = self.checksum = 0
        self.documents = self.skipped = 0

    def write(self, tokens: np.ndarray) -> None:
        """Adds tokens (n,)."""
        self._chunks.append(tokens.astype(self._dtype))
        self._waiting += len(tokens)
        if self._waiting >= RECORD_TOKENS:
            self._write_records(RECORD_TOKENS)

    def _write_records(self, min_tokens: int) -> None:
        waiting = np.concatenate([*self._chunks, np.zeros(0, self._dtype)])
        while len(waiting) >= min_tokens:
            record, waiting = waiting[:RECORD_TOKENS], waiting[RECORD_TOKENS:]
            example = self._features.encode_example({"tokens": record})
            with _writing(self._path):
                self._writer.write(self._serializer.serialize_example(example))
            self.checksum = zlib.crc32(record.tobytes(), self.checksum)
            self.tokens, self.records = self.tokens + len(record), self.records + 1
        self._chunks, self._waiting = [waiting.copy()], len(waiting)

    def close(self) -> Written:
        """Ends the shard, and puts it in its place."""
        if self._waiting:
            self._write_records(1)
        with _writing(self._path):
            self._writer.close()
        os.replace(self._partial, self._path)
        size = self._path.stat().st_size
        counts = self.documents, self.skipped
        return Written(self.tokens, self.records, size, self.checksum, *counts)

    def abandon(self) -> None:
        """Leaves nothing."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self._partial.unlink(missing_ok=True)


def finished(
    layout: Layout, part: int, key: str, shards: Iterable[tuple[str, int]]
) -> list[Written] | None:
    """What the shards of a part hold, if all of them are there, whole, and of the part as it is.

    Args:
      layout: where the shards are.
      part: its number.
      key: a digest of the part; shards that were made of another are none of it.
      shards: split and place in the split of each.
    """
    try:
        record = json.loads(layout.progress(part).read_text())
        if record["key"] != key:
            return None
        result = [Written(*values) for values in record["shards"]]
        sizes = [layout.shard(*shard).stat().st_size for shard in shards]
    except (OSError, LookupError, ValueError, TypeError):
        return None
    return result if sizes == [written.bytes for written in result] else None


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text)
    os.replace(partial, path)


def write_metadata(
    layout: Layout, splits: Mapping[str, list[Written]], dtype: np.dtype, about: Mapping[str, Any]
) -> None:
    """Writes what TFDS and `read_metadata` read, and `dataset_info.json` last.

    Args:
      layout: where the shards are.
      splits: what they hold.
      dtype: of the tokens.
      about: more to keep in metadata.json, such as the tokenizer.
    """
    import tensorflow_datasets as tfds

    shards = {split: [w._asdict() for w in written] for split, written in splits.items()}
    known = {**about, "dtype": np.dtype(dtype).name, "record_tokens": RECORD_TOKENS}
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=layout.name,
        version=tfds.core.Version(VERSION),
        data_dir=str(layout.folder),
        module_name="",
        config_name=layout.folder.parent.name,
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=f"Tokens of {layout.name}, in order",
        features=features_of(dtype),
        metadata=tfds.core.MetadataDict({**known, "shards": shards}),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=layout.folder, dataset_name=layout.name, filetype_suffix="array_record"
    )
    created = [_split_info(name, written, template) for name, written in splits.items()]
    info.set_splits(tfds.core.splits.SplitDict(created))
    staging = layout.folder / "progress" / "metadata"
    staging.mkdir(parents=True, exist_ok=True)
    info.write_to_directory(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == INFO):
        os.replace(path, layout.folder / path.name)
    staging.rmdir()


def _split_info(name: str, written: list[Written], template):
    import tensorflow_datasets as tfds

    return tfds.core.splits.SplitInfo(
        name=name,
        shard_lengths=[w.records for w in written],
        num_bytes=sum(w.bytes for w in written),
        filename_template=template.replace(split=name),
    )


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a prepared data set."""
    return (folder / INFO).is_file() and (folder / METADATA).is_file()


def read_metadata(folder: Path, cure: str = REMAKE) -> dict[str, Any]:
    """What `write_metadata` kept.

    Args:
      folder: of the data set.
      cure: what to do when it is damaged.

    Raises:
      UserError: it is damaged, or a shard is not whole.
    """
    try:
        result = json.loads((folder / METADATA).read_text())
        msgspec.convert(result, Metadata, strict=True)
        counts = {split: len(written) for split, written in result["shards"].items()}
        info = msgspec.json.decode((folder / INFO).read_bytes(), type=Info)
        layout = Layout(folder, info.name, counts)
        result["paths"] = {
            split: [
                _complete_file(layout.shard(split, i), w["bytes"], cure)
                for i, w in enumerate(written)
            ]
            for split, written in result["shards"].items()
        }
        return result
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the metadata of {folder} is damaged ({error}); {cure}") from None


def _complete_file(path: Path, size: int, cure: str) -> Path:
    result = path.stat().st_size if path.is_file() else None
    if result != size:
        what = "is missing" if result is None else f"has {result:,} bytes, not {size:,}"
        raise UserError(f"the shard {path} {what}; {cure}")
    return path


def shards_of(metadata: Mapping[str, Any], split: str) -> list[Shard]:
    """The shards of a split."""
    paths, written = metadata["paths"].get(split, []), metadata["shards"].get(split, [])
    return [Shard(path, w["tokens"]) for path, w in zip(paths, written, strict=True)]
