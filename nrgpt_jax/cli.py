"""What the programs share: flags, shares as they are printed, and errors that end in one line and a
non-zero exit code."""

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from nrgpt_jax.configs import default_config
from nrgpt_jax.errors import MISTAKE, UserError

_FLAG_ERRORS = (flags.Error, AttributeError, FileNotFoundError, KeyError, TypeError, ValueError)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage; one that is not zero is never written as zero: `<0.1%`."""
    least = 10.0**-digits
    if 0.0 < 100.0 * share < 0.5 * least:
        return f"<{least:.{digits}f}%"
    return f"{share:.{digits}%}"


def run(main: Callable[[], object]) -> None:
    """Parses the flags and calls `main`."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; settings are given as --config.field=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    _check_experiment(argv)
    _check_fields(argv)
    try:
        return flags.FLAGS(argv)
    except _FLAG_ERRORS as error:
        _fail(" ".join(str(error.args[0] if error.args else error).split()))


def _check_experiment(argv: Sequence[str]) -> None:
    """A wrong experiment name lists the experiments."""
    for argument in argv:
        name, _, value = argument.partition("=")
        path = Path(value.split(":")[0])
        if name.lstrip("-") == "config" and value and not path.exists():
            folder = path.parent if path.parent.is_dir() else Path("experiments")
            known = ", ".join(sorted(p.stem for p in folder.glob("[!_]*.py")))
            _fail(f"there is no experiment {path}; {folder}/ has {known or 'none'}")


def _check_fields(argv: Sequence[str]) -> None:
    """A field that no configuration has names the nearest ones."""
    fields = _field_names(default_config())
    for argument in argv:
        name = argument.partition("=")[0].lstrip("-")
        field = name.removeprefix("config.")
        if name.startswith("config.") and field not in fields:
            last = field.rpartition(".")[2]
            near = [f for f in fields if f.rpartition(".")[2] == last]
            near = near or difflib.get_close_matches(field, fields, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "there are " + ", ".join(fields)
            )
            _fail(f"unknown field --config.{field}; {hint}")


def _field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in config.items():
        inner = isinstance(value, ConfigDict)
        names += _field_names(value, f"{prefix}{name}.") if inner else [prefix + name]
    return names


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(MISTAKE)


def define_config_flag() -> flags.FlagHolder:
    """--config=experiments/NAME.py[:variant], with --config.field=value."""
    return config_flags.DEFINE_config_file("config", lock_config=True)


def define_workdir_flag() -> flags.FlagHolder:
    """--workdir=DIR, the run directory."""
    holder = flags.DEFINE_string("workdir", None, "Run directory.", required=True)
    message = "a run directory is a folder; mount a bucket to have it in one (docs/launch.md)"
    flags.register_validator("workdir", lambda value: "://" not in (value or ""), message)
    return holder
