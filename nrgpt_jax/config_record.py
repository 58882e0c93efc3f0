"""Configurations read from files and returned by experiments: checks of fields and types."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from ml_collections import ConfigDict

from nrgpt_jax import disk
from nrgpt_jax.configs import default_config, field_names
from nrgpt_jax.errors import UserError

RECORD = "record"  # entry of the file for all data of a run that are not fields
RENAMED = {  # fields of earlier versions, whose records can still be read
    "model.rate": "model.inference_rate",
    "model.rate_init": "model.inference_rate_init",
    "model.rate_decay": "model.inference_rate_decay",
    "model.blocks": "model.num_distinct_layers",
    "optimizer.decay": "optimizer.weight_decay_mask",
    "depth.least": "depth.min_steps",
    "depth.most": "depth.max_steps",
    "depth.each": "depth.sample_per",
    "depth.growth_steps": "depth.curriculum_steps",
    "depth.gradient_steps": "depth.backprop_steps",
    "depth.held": "depth.refine_passes",
    "depth.held_before": "depth.max_burn_in_passes",
    "depth.decoded": "depth.train_on_decoded",
    "model.kernels": "model.implementation",
}
RENAMED_VALUES = {"model.implementation": {"plain": "autodiff"}}


class Recorded(NamedTuple):
    """A configuration read from a file."""

    config: ConfigDict  # all fields, locked; fields missing in the file have their defaults
    fields_set: Mapping[str, Any]  # the fields in the file


def read_record(path: Path, cure: str) -> Recorded:
    """Read a recorded configuration; types of values are checked, ranges are not.

    Args:
      path: the JSON file.
      cure: advice for an unreadable file, appended to the error message.

    Raises:
      FileNotFoundError: the file does not exist.
      UserError: the file is damaged, or a field, which the message names, is unknown or mistyped.
    """
    fields_set = _set_fields(disk.read_json(path, schema(), cure, renamed))
    fields_set.pop(RECORD, None)
    config = default_config()
    config.update(fields_set)
    return Recorded(config, fields_set)


def renamed(content: Any) -> Any:
    """Rename the fields of earlier versions in the content of a record to their current names."""
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        fields = content.get(group) if isinstance(content, dict) else None
        if isinstance(fields, dict) and name in fields:
            value = fields.pop(name)
            fields[new.partition(".")[2]] = RENAMED_VALUES.get(new, {}).get(value, value)
    return content


@functools.cache
def schema() -> type[msgspec.Struct]:
    """Return the msgspec type of a record: all fields optional, typed as their defaults."""
    return _struct("config", default_config(), [(RECORD, dict[str, Any])])


def _struct(
    name: str, config: ConfigDict, extra: list[tuple[str, Any]] | None = None
) -> type[msgspec.Struct]:
    fields = [(field, _type(field, value)) for field, value in config.items()] + (extra or [])
    return msgspec.defstruct(
        name,
        [(field, kind | msgspec.UnsetType, msgspec.UNSET) for field, kind in fields],
        forbid_unknown_fields=True,
        kw_only=True,
    )


def _type(name: str, value: Any) -> Any:
    if name.endswith("options"):
        return dict[str, bool | int | float | str]
    if isinstance(value, ConfigDict):
        return _struct(name, value)
    return tuple[str, ...] if isinstance(value, tuple) else type(value)


def _set_fields(content: msgspec.Struct) -> dict[str, Any]:
    fields = msgspec.structs.asdict(content).items()
    return {
        name: _set_fields(value) if isinstance(value, msgspec.Struct) else value
        for name, value in fields
        if value is not msgspec.UNSET
    }


def check_complete(config: Any) -> None:
    """Raise UserError if an experiment's configuration has missing, unknown or mistyped fields."""
    if not isinstance(config, ConfigDict):
        raise UserError("an experiment's get_config() returns what default_config() returned")
    try:
        complete = config.copy_and_resolve_references().to_dict()
        fields_set = _set_fields(msgspec.convert(complete, schema(), strict=True))
    except (msgspec.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the experiment's configuration is not possible: {reason}") from None
    missing = sorted(set(field_names(default_config())) - set(field_names(fields_set)))
    if missing:
        raise UserError(f"the experiment's configuration has no field {', '.join(missing[:5])}")
