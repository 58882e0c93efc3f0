"""Loading of sweeps from experiment files: `get_sweep(scale)` beside `get_config(variant)`."""

import contextlib
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from nrgpt_jax import cli
from nrgpt_jax.config_record import check_complete
from nrgpt_jax.configs import flattened, set_fields
from nrgpt_jax.errors import UserError


def load_module(experiment: Path) -> SimpleNamespace:
    """Return the globals of an experiment file. Raises UserError if there is no such file."""
    if not experiment.is_file():
        known = ", ".join(sorted(p.stem for p in experiment.parent.glob("[!_]*.py"))) or "none"
        raise UserError(f"there is no experiment {experiment}; {experiment.parent}/ has {known}")
    with _message(experiment):
        return SimpleNamespace(**runpy.run_path(str(experiment)))


@contextlib.contextmanager
def _message(experiment: Path) -> Iterator[None]:
    """Turn an error in an experiment file into a one-line UserError with its location."""
    try:
        yield
    except Exception as error:
        raise UserError(cli.reason(error, [experiment])) from None


def load(
    experiment: Path, scale: str = "", changes: Mapping[str, Any] | None = None
) -> dict[str, ConfigDict]:
    """Return the configurations of a sweep by run name.

    Args:
      experiment: experiment file.
      scale: scale of the sweep.
      changes: values to set in all configurations, by dotted field name.

    Raises:
      UserError: the file defines no sweep, or none of this scale, or a run or change is invalid.
    """
    module = load_module(experiment)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"{experiment} has no get_sweep(scale); it describes no sweep")
    with _message(experiment):
        configs = dict(module.get_sweep(scale))
    for name, config in configs.items():
        check_complete(config)
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or len(parts) != 2:
            raise UserError(f"{name!r} of {experiment} is no name of a run: VARIANT/SEED")
    if not configs:
        raise UserError(f"the sweep of {experiment} has no runs")
    return _changed(configs, dict(changes)) if changes else configs


def _changed(configs: dict[str, ConfigDict], changes: dict[str, Any]) -> dict[str, ConfigDict]:
    """Return copies with fields set. Raises UserError for a field that the sweep varies."""
    for field in changes:
        values = {str(flattened(config).get(field)) for config in configs.values()}
        if len(values) > 1:
            raise UserError(f"{field} differs between the runs of this sweep: it cannot be set")
    result = {name: ConfigDict(config) for name, config in configs.items()}
    for config in result.values():
        set_fields(config, changes)
        check_complete(config)
    return result
