"""Run directories: config.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/.

A run directory describes its run completely: `train` resumes it, `sample` needs nothing else, and
`evaluate` only the data set that it names.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
from ml_collections import ConfigDict

from nrgpt_jax import __version__, disk, paths, plugins
from nrgpt_jax.config_record import RECORD, read_record
from nrgpt_jax.core.metrics import METRICS
from nrgpt_jax.datasets import DATASETS, GIVEN
from nrgpt_jax.datasets.tokenizers import FIXED as TOKENIZERS
from nrgpt_jax.datasets.tokenizers import (
    RESTORE,
    Tokenizer,
    as_record,
    load_tokenizer,
    save_tokenizer,
)
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_shapes
from nrgpt_jax.models.evaluators import EVALUATORS
from nrgpt_jax.models.names import registered_parts
from nrgpt_jax.registry import Registry
from nrgpt_jax.runs.record_checks import check_recorded


class _Part(TypedDict):
    module: str
    checksum: str


CONFIG_FILE: str = "config.json"
TOKENIZER_FILE: str = "tokenizer.json"
FORMAT = 2  # version of the layout of a run directory
CONVERTS_VERSION_1 = "c7d12cf"  # the last converting commit, on a development line
RECORDED_VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")
_TRIES = 5  # attempts to lock a directory, within 0.2 seconds
FIXED = ("model", "data", "seed", "init_from")  # cannot change when a run resumes, except FREE
FREE = (*(f"model.{name}" for name in ("scan_unroll", "remat", "implementation")), "data.path")


def open_run(workdir: Path) -> tuple[ConfigDict, Tokenizer]:
    """Load configuration and tokenizer of a run. Raises UserError if one is missing or damaged."""
    return load_config(workdir), load_tokenizer(workdir / TOKENIZER_FILE)


def load_config(workdir: Path) -> ConfigDict:
    """Load the recorded configuration of a run; fields newer than the run have their defaults.

    Raises:
      UserError: it is missing, damaged, or of another version of this package.
    """
    path = workdir / CONFIG_FILE
    made_by = _record_of(workdir).get("format", 1)  # first: a newer version has other fields
    if not isinstance(made_by, int) or made_by > FORMAT:
        raise UserError(
            f"{workdir} was made by a newer version (format {made_by}, here {FORMAT}); update "
            "nrgpt-jax"
        )
    try:
        result = read_record(path, RESTORE)
    except FileNotFoundError:
        raise UserError(
            f"{workdir} is not a run directory (it has no {CONFIG_FILE}); train first, or name "
            "another --workdir"
        ) from None
    model = result.fields_set.get("model")
    if model is None:
        raise UserError(f"{path} describes no model; {RESTORE}")
    if "rule" not in model:
        raise UserError(
            f"{workdir} was made by version 0.1, which named parameters otherwise; to convert it, "
            f"check out commit {CONVERTS_VERSION_1} of this repository and run python -m "
            f"nrgpt_jax.convert --run={workdir} --workdir=NEW_FOLDER there"
        )
    plugins.load(result.config.plugins)
    recorded = _parts_of(_record_of(workdir))
    plugins.import_parts(recorded)
    check_recorded(path, result.config, _cure(recorded))
    plugins.compare(str(workdir), recorded, described_parts(result.config))
    return result.config


def _parts_of(record: Mapping[str, Any]) -> plugins.Parts:
    """Return the recorded parts; none if the record is malformed."""
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(record.get("parts", {}), dict[str, _Part], strict=True)
    return {}


def _cure(recorded: plugins.Parts) -> str:
    here = [part for part, record in recorded.items() if record["module"] == "__main__"]
    if not here:
        return RESTORE
    registered = f"{', '.join(here)} was registered by a script or notebook"
    return f"{registered}: register it before opening the run, or move it to a module"


def described_parts(config: ConfigDict) -> dict[str, dict[str, str]]:
    """Return the parts of a configuration that are registered outside of this package."""
    chosen: list[tuple[Registry, str]] = [*registered_parts(config.model.to_dict())]
    chosen += [(METRICS, name) for name in config.step_metrics]
    chosen += [(EVALUATORS, name) for name in config.evaluators]
    if config.data.tokenizer in TOKENIZERS:
        chosen.append((TOKENIZERS, config.data.tokenizer))
    data = [(DATASETS, config.data.name)] if config.data.name in DATASETS else []
    return plugins.describe([*chosen, *data])


def check_run(workdir: Path, config: ConfigDict, tokenizer: Tokenizer) -> list[str]:
    """Check that an existing run can resume with this configuration.

    Returns:
      The fields that have changed since it was recorded (none of them fixed).

    Raises:
      UserError: the directory holds a run of another model, data set, vocabulary or optimizer.
    """
    if not (workdir / CONFIG_FILE).exists():
        return []
    old_config, old_tokenizer = open_run(workdir)
    changed = differences(old_config.to_dict(), config.to_dict())
    names = {change: change.split("=")[0] for change in changed}
    fixed = [c for part in FIXED for c in changed if names[c].split(".")[0] == part]
    fixed = [c for c in fixed if names[c] not in FREE]
    if fixed:
        difference = fixed[0] + _parameter_difference(old_config, config)
        raise UserError(
            f"{workdir} holds another run: {difference}; name another --workdir, or remove this one"
        )
    optimizers = [c for c in changed if names[c] == "optimizer.name" and repr(GIVEN) in c]
    if optimizers:
        raise UserError(
            f"{workdir} was trained with another optimizer ({optimizers[0]}); {GIVEN!r} was handed "
            "to nrgpt_jax.train(optimizer=...): do as before, or name another --workdir"
        )
    if as_record(old_tokenizer) != as_record(tokenizer):
        raise UserError(f"{workdir} was trained with another vocabulary; name another --workdir")
    return changed


def record_run(
    workdir: Path,
    config: ConfigDict,
    tokenizer: Tokenizer,
    since_step: int = 0,
    changes: Sequence[str] = (),
) -> None:
    """Write the configuration and the tokenizer of a run, each atomically.

    Args:
      workdir: the run directory; created if needed.
      config, tokenizer: the configuration and the tokenizer to write.
      since_step: the step of the state from which on the run uses this configuration.
      changes: the fields that differ from the previous configuration.

    Raises:
      OSError: they cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, workdir / TOKENIZER_FILE)
    before = _record_of(workdir)
    versions = {"nrgpt-jax": __version__}  # not from metadata: a clone runs uninstalled
    versions |= {name: metadata.version(name) for name in RECORDED_VERSIONS}
    parts, parts_before = described_parts(config), _parts_of(before)
    changed = [*changes, *differences(before.get("versions", versions), versions)]
    changed += differences(parts_before or parts, parts)
    history = [*before.get("history", [])]
    if changed or not before:
        history.append({"since_step": since_step, "changes": changed})
    record = {**before, "format": FORMAT, "versions": versions, "history": history}
    if parts:
        record["parts"] = parts
    disk.write_json(workdir / CONFIG_FILE, {RECORD: record, **config.to_dict()})


def _record_of(workdir: Path) -> dict[str, Any]:
    """Return the metadata of config.json; empty if it cannot be read."""
    with contextlib.suppress(FileNotFoundError, UserError):
        record = disk.read_json(workdir / CONFIG_FILE, dict[str, Any], "").get(RECORD)
        return record if isinstance(record, dict) else {}
    return {}


class InUse(UserError):
    """Another process trains in a run directory."""


class Lock(NamedTuple):
    """The lock of the one process that trains in a run directory."""

    workdir: Path
    held: int | bytes  # the file descriptor; on a bucket, the token that was written there

    def check(self) -> None:
        """Raise OSError if the directory is no longer the one that was locked."""
        lock = self.workdir / "lock"
        try:
            if isinstance(self.held, bytes):
                with paths.os_errors(lock):
                    same = lock.read_bytes() == self.held
            else:
                same = os.path.samestat(os.stat(lock), os.fstat(self.held))
        except FileNotFoundError:
            same = False
        if not same and isinstance(self.held, bytes):
            raise OSError(
                f"{self.workdir} was removed, or another process has begun to train there since: "
                "what this one had done since its last checkpoint is lost"
            )
        if not same:
            raise OSError(
                f"{self.workdir} was removed or replaced while the run was training: what it had "
                "done since is lost; start it again, and leave the folder where it is"
            )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Lock]:
    """Lock a run directory for training. Raises InUse if another process has locked it.

    A bucket has no locks, and a preempted machine could not release one: there the process that
    started last may train, and `Lock.check` ends the earlier one.
    """
    if paths.on_bucket(workdir):
        token = uuid.uuid4().hex.encode()
        try:
            disk.write_whole(workdir / "lock", token)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and "Forbidden" not in str(error):
                raise  # it may succeed later
            raise UserError(
                f"{workdir} cannot be written; is there such a bucket, and may these credentials "
                f"write to it? ({error.strerror or error})"
            ) from None
        yield Lock(workdir, token)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("a") as file:
        for left in reversed(range(_TRIES)):  # `in_use` holds the lock only briefly
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not left:
                    said = f"another process is training in {workdir}; wait or stop it"
                    raise InUse(said) from None
                time.sleep(0.05)
        for partial in {*workdir.glob("*.partial-*")} - {*workdir.glob("evaluation*")}:
            partial.unlink(missing_ok=True)  # left by a training that was killed
        yield Lock(workdir, file.fileno())


def in_use(workdir: Path) -> bool:
    """Return whether a process trains in a directory; False on a bucket, where it is unknown."""
    if paths.on_bucket(workdir):
        return False
    try:
        with (workdir / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the fields in which two configurations differ, as `name=old there, new here`."""
    result = []
    for field in sorted(set(old) | set(new)):
        there, here = old.get(field), new.get(field)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            result += differences(there, here, f"{prefix}{field}.")
        elif there != here:
            result.append(f"{prefix}{field}={there!r} there, {here!r} here")
    return result


def _parameter_difference(old: ConfigDict, new: ConfigDict) -> str:
    there, here = parameter_shapes(create_model(old)), parameter_shapes(create_model(new))
    for path in sorted(set(there) | set(here)):
        if there.get(path) != here.get(path):
            old_shape, new_shape = there.get(path, "absent"), here.get(path, "absent")
            return f" (parameter {path}: {old_shape} there, {new_shape} here)"
    return ""
