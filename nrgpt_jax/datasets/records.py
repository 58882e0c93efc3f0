"""Where data lives, and TFDS builders that write array_record without TensorFlow.

Corpora are looked for under `NRGPT_DATA_DIR`, then under `data/` of the repository. What is made
from them (tokens, ListOps expressions) is written once below `NRGPT_CACHE_DIR`, by default
`data/prepared/`, under a name that changes with every setting it depends on. Where the package is
installed without its repository, `data/` is `nrgpt_jax` in the cache folder of the user.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from nrgpt_jax.errors import UserError


def _data_home(repository: Path) -> Path:
    if (repository / "setup.cfg").is_file():
        return repository / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nrgpt_jax"


DATA_HOME = _data_home(Path(__file__).resolve().parents[2])


def data_roots() -> list[Path]:
    """Folders in which a corpus may lie; a download goes to the first."""
    named = os.environ.get("NRGPT_DATA_DIR")
    return ([Path(named)] if named else []) + [DATA_HOME]


def cache_root() -> Path:
    """The folder of prepared data sets."""
    return Path(os.environ.get("NRGPT_CACHE_DIR") or DATA_HOME / "prepared")


def unwritable(error: Exception, place: Path) -> UserError:
    """What to say when prepared data cannot be written: a full disk, a folder of another user."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
    named = getattr(error, "filename", None) or place
    return UserError(
        f"{named} cannot be written ({reason}); make room there, or name another folder for "
        "prepared data: NRGPT_CACHE_DIR=..."
    )


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for a set of settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder whose splits are given as functions that yield examples, in order.

    Subclasses set FEATURES and DESCRIPTION. `settings` is whatever the content depends on.
    """

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: Mapping[str, Any] = {}
    DESCRIPTION = ""

    def __init__(
        self, settings: Mapping[str, Any], make_splits: Callable[[], Mapping[str, Iterable]]
    ):
        self._make_splits = make_splits
        config = tfds.core.BuilderConfig(name=digest(settings), description=self.DESCRIPTION)
        with _quiet():
            super().__init__(data_dir=str(cache_root()), config=config, file_format="array_record")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(dict(self.FEATURES)),
            disable_shuffling=True,  # a stream keeps its order
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {name: enumerate(examples) for name, examples in self._make_splits().items()}

    def _generate_examples(self):
        raise TypeError("splits are given as iterables of examples")

    def prepare(self) -> "RecordBuilder":
        """Writes the data set unless it is there; an interrupted attempt leaves nothing."""
        with _quiet():
            tfds.disable_progress_bar()
            prepared = self.is_prepared()
        if not prepared:
            print(f"preparing data set {self.name} in {self.data_dir}", file=sys.stderr)
            try:
                with _quiet():
                    self.download_and_prepare()
            except OSError as error:  # another process was faster; its data set is the same
                if not self.is_prepared():
                    raise unwritable(error, Path(self.data_dir)) from None
            self.info.read_from_directory(self.data_dir)
        return self

    @property
    def fingerprint(self) -> str:
        """Names the content; another corpus or other settings have another."""
        return self.builder_config.name

    def records(self, split: str) -> Iterable[dict[str, Any]]:
        """The examples of a split, in the order in which they were written."""
        source = self.as_data_source(split=split)
        return source.__getitems__(range(len(source)))


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS from telling every user about its configuration and a download of nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


class TokenBuilder(RecordBuilder):
    """Splits of token sequences, each with an `answer` token."""

    FEATURES = {
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint16),
        "answer": tfds.features.Scalar(dtype=np.uint16),
    }
