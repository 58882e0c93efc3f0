"""Prepared data: a TFDS data set whose shards are written one by one, each atomically.

A TFDS builder writes a data set in one go and starts again after a kill; these shards are kept.
A data set is in `NAME/KEY/VERSION` below the cache folder. KEY changes with everything the tokens
depend on, VERSION with the layout. A part of the corpus becomes one shard of each of its splits.
TFDS writes `dataset_info.json` last: without it a data set is incomplete, and preparation resumes.
`metadata.json` holds the fields that TFDS lacks: tokens and bytes of each shard, the tokenizer and
the fingerprint.
"""

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import numpy as np

from nrgpt_jax import disk
from nrgpt_jax.datasets.places import unwritable
from nrgpt_jax.datasets.streams import RecordStream, Shard
from nrgpt_jax.errors import UserError

VERSION = "2.0.0"
RECORD_TOKENS = 4096  # a window of 1,025 touches one record, sometimes two
INFO, METADATA = "dataset_info.json", "metadata.json"
REMAKE = (
    f"remove {INFO} there and prepare the data again: only what is incomplete is computed again"
)


class Written(NamedTuple):
    """The contents of a shard: counts, size and checksum."""

    tokens: int
    records: int
    bytes: int
    checksum: int
    documents: int
    skipped: int = 0  # documents without text


Name = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*$")]
"""The name of a data set or a split: part of a file name, which cannot lead out of its folder."""
Count = Annotated[int, msgspec.Meta(ge=0)]


class WrittenRecord(TypedDict):
    """The fields that are read from a recorded `Written`."""

    tokens: Count
    bytes: Count


class Metadata(TypedDict):
    """The fields that are read from `metadata.json`."""

    shards: dict[Name, list[WrittenRecord]]
    dtype: Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"]
    record_tokens: Annotated[int, msgspec.Meta(gt=0)]
    tokenizer: dict[str, Any]
    fingerprint: str


class Info(TypedDict):
    """The fields that are read from `dataset_info.json`."""

    name: Name


def shard_path(folder: Path, name: str, split: str, index: int, count: int) -> Path:
    """Return the path of shard `index` of `count`, as TFDS names it."""
    return folder / f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def features_of(dtype: np.dtype | str):
    """Return the TFDS features of a record: up to RECORD_TOKENS tokens."""
    import tensorflow_datasets as tfds

    encoding = tfds.features.Encoding.BYTES
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.dtype(dtype), encoding=encoding)
    return tfds.features.FeaturesDict({"tokens": tokens})


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn array_record's error on a full disk into a UserError of one line."""
    try:
        yield
    except RuntimeError as error:
        raise unwritable(error, path) from None


class ShardWriter:
    """The writer of one shard.

    Raises:
      UserError: the shard cannot be written, for instance on a full disk.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        from array_record.python import array_record_module
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._path, self._dtype, self._features = path, dtype, features_of(dtype)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        with _writing(path):
            options = "group_size:1,uncompressed"
            self._writer = array_record_module.ArrayRecordWriter(str(path), options)
        self._waiting = np.zeros(0, dtype)
        self.tokens = self.records = self.checksum = self.documents = self.skipped = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens (n,)."""
        self._waiting = np.concatenate([self._waiting, tokens.astype(self._dtype)])
        self._write_records(RECORD_TOKENS)

    def _write_records(self, min_tokens: int) -> None:
        while len(self._waiting) >= min_tokens:
            record, self._waiting = np.split(self._waiting, [RECORD_TOKENS])
            example = self._features.encode_example({"tokens": record})
            with _writing(self._path):
                self._writer.write(self._serializer.serialize_example(example))
            self.checksum = zlib.crc32(record.tobytes(), self.checksum)
            self.tokens, self.records = self.tokens + len(record), self.records + 1

    def close(self) -> Written:
        """Complete the shard and return a description of its contents."""
        self._write_records(1)
        with _writing(self._path):
            self._writer.close()
        size = self._path.stat().st_size
        return Written(self.tokens, self.records, size, self.checksum, self.documents, self.skipped)

    def abandon(self) -> None:
        """Close the incomplete file, ignoring errors."""
        with contextlib.suppress(Exception):
            self._writer.close()


def write_metadata(
    folder: Path,
    name: str,
    splits: Mapping[str, list[Written]],
    dtype: np.dtype,
    about: Mapping[str, Any],
) -> None:
    """Write the metadata that TFDS and `read_metadata` read, `dataset_info.json` last.

    Args:
      folder: the folder of the data set.
      name: the name of the data set.
      splits: the contents of the shards of each split.
      dtype: the dtype of the tokens.
      about: further entries of metadata.json, such as the tokenizer.
    """
    import tensorflow_datasets as tfds

    known = {**about, "dtype": np.dtype(dtype).name, "record_tokens": RECORD_TOKENS}
    shards = {split: [w._asdict() for w in written] for split, written in splits.items()}
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="array_record"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features_of(dtype),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[w.records for w in written],
                num_bytes=sum(w.bytes for w in written),
                filename_template=template.replace(split=split),
            )
            for split, written in splits.items()
        ],
        filename_template=template,
        check_data=False,
        description=f"Tokens of {name}, in order",
        metadata=tfds.core.MetadataDict({**known, "shards": shards}),
        disable_shuffling=True,
    )


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a complete data set; a kill may leave empty metadata files."""
    files = folder / INFO, folder / METADATA
    return all(file.is_file() and file.stat().st_size for file in files)


def read_metadata(folder: Path, cure: str = REMAKE) -> dict[str, Any]:
    """Return the metadata of `write_metadata`, with the `paths` of the shards of each split.

    Args:
      folder: the folder of the data set.
      cure: the advice in the message if it is damaged.

    Raises:
      UserError: the metadata are damaged, or a shard is incomplete.
    """
    try:
        metadata = disk.read_json(folder / METADATA, Metadata, cure)
        name = disk.read_json(folder / INFO, Info, cure)["name"]
    except OSError as error:
        raise UserError(f"the metadata of {folder} is damaged ({error}); {cure}") from None
    paths = {
        split: [
            _complete_file(shard_path(folder, name, split, i, len(written)), w["bytes"], cure)
            for i, w in enumerate(written)
        ]
        for split, written in metadata["shards"].items()
    }
    return {**metadata, "paths": paths}


def _complete_file(path: Path, size: int, cure: str) -> Path:
    result = path.stat().st_size if path.is_file() else None
    if result != size:
        what = "is missing" if result is None else f"has {result:,} bytes, not {size:,}"
        raise UserError(f"the shard {path} {what}; {cure}")
    return path


def shards_of(metadata: Mapping[str, Any], split: str) -> list[Shard]:
    """Return the shards of a split."""
    paths, written = metadata["paths"].get(split, []), metadata["shards"].get(split, [])
    return [Shard(path, w["tokens"]) for path, w in zip(paths, written, strict=True)]


def stream_of(metadata: Mapping[str, Any], split: str, cure: str | None = None) -> RecordStream:
    """Return the stream of a split, read in place; `cure` is the advice for a damaged shard."""
    features = features_of(metadata["dtype"])
    return RecordStream(shards_of(metadata, split), metadata["record_tokens"], features, cure)
