"""Command-line functions: flags, percentages, and errors as one line with an exit code."""

import ast
import difflib
import importlib.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from nrgpt_jax import bundled, interrupts, paths
from nrgpt_jax.config_record import RENAMED, check_complete
from nrgpt_jax.configs import (
    OPTIONS,
    default_config,
    field_names,
    flattened,
    set_fields,
)
from nrgpt_jax.credentials import masked
from nrgpt_jax.errors import FAILED, MISTAKE, UserError, stopped_by

_UNREAD = stopped_by(signal.SIGPIPE)  # the reader of the output has exited, as `head` does


def require_installed(extra: str, *modules: str) -> None:
    """Raise UserError if a module is missing; it names the extra that installs the module."""
    for module in modules:
        if not importlib.util.find_spec(module):
            cure = f"pip install 'nrgpt-jax[{extra}]', or make setup in a checkout"
            raise UserError(f"this needs {module}, which is not installed: {cure}")


def percent(share: float, digits: int = 1) -> str:
    """Format a share as a percentage; a nonzero share never rounds to zero: `<0.1%`."""
    smallest = 10.0**-digits
    if 0.0 < 100.0 * share < 0.5 * smallest:
        return f"<{smallest:.{digits}f}%"
    return f"{share:.{digits}%}"


arguments: list[str] = []  # arguments of the program, unchanged
_options: dict[str, Any] = {}  # option fields on the command line, such as `model.options.NAME`
_TUPLES = tuple(n for n, v in flattened(default_config()).items() if isinstance(v, tuple))


def _read_arguments() -> None:
    """Move the arguments that config_flags cannot parse from `sys.argv` to `_options`."""
    arguments[:] = arguments or sys.argv
    words, options = readable(sys.argv)
    _options.update(options)
    sys.argv[:] = words


def readable(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments in the syntax of config_flags, and the options by dotted name.

    Options are fields that no configuration declares. Tuples need no brackets:
    `--config.model.energies=injection,leak`.
    """
    result, options, rest = list[str](), dict[str, Any](), list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        field = name.lstrip("-").removeprefix("config.")
        group, _, option = field.rpartition(".")
        if not re.match("--?config[.]", word):
            result.append(word)
        elif group in OPTIONS and option.isidentifier() and (equals or rest):
            options[field] = _literal(value if equals else rest.pop(0))
        elif field in _TUPLES and equals and value[:1] not in ("(", "["):
            names = (part.strip().strip("'\"") for part in value.split(","))
            result.append(f"{name}={tuple(filter(None, names))!r}")
        else:
            result.append(word)
    return result, options


def _literal(value: str) -> bool | int | float | str:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        result = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
    return result if isinstance(result, (bool, int, float, str)) else value


def run(main: Callable[[], object]) -> None:
    """Parse the flags and call `main`."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; settings are given as --config.field=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        call(main)

    interrupts.end_at_once()
    _read_arguments()
    app.run(guarded, flags_parser=parse)


def call(main: Callable[[], object]) -> None:
    """Call `main`; errors of the user or the machine end the program with one line.

    Raises:
      SystemExit: MISTAKE after a UserError, FAILED after an OSError or out of memory, 130 after
        Ctrl-C. Any other exception is a bug, and keeps its traceback.
    """
    try:
        interrupts.raise_exception()
        main()
        sys.stdout.flush()  # raises on a full disk
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(interrupts.INTERRUPTED)
    except BrokenPipeError:
        _end_output()
        sys.exit(_UNREAD)
    except OSError as error:
        _end_output()
        _fail(_where(error), FAILED)
    except Exception as error:
        reason = _memory_is_short(error)
        if reason is None:
            raise
        _fail(reason, FAILED)
    finally:
        interrupts.end_at_once()


def _where(error: OSError) -> str:
    """Return the path and the reason of an error."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _memory_is_short(error: Exception) -> str | None:
    """Return the message of an out-of-memory error; None for any other error."""
    if isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
        and str(error).startswith("RESOURCE_EXHAUSTED")
    ):
        reason = " ".join(str(error).split())[:200] or "the memory is full"
        return f"out of memory ({reason}); use a smaller batch, context or model"
    return None


def _end_output() -> None:
    """Flush stdout, or redirect it to the null device: Python would flush again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags and return the other arguments; an error ends the program with one line."""
    _check_text(argv)
    experiments = _experiments(argv)
    for path in experiments:
        _check_experiment(path)
    _check_fields(argv)
    try:
        rest = flags.FLAGS(argv)
        if _options and "config" not in flags.FLAGS:
            _fail(f"--config.{next(iter(_options))} is not for this program: it has no --config")
        if experiments and "config" in flags.FLAGS:
            config: Any = flags.FLAGS["config"].value
            check_complete(config)
            set_fields(config, _options)
        return rest
    except BrokenPipeError:  # from --help
        _end_output()
        sys.exit(_UNREAD)
    except Exception as error:  # an invalid flag or value, or any error in an experiment file
        _fail(reason(error, experiments))


def reason(error: BaseException, experiments: Sequence[Path]) -> str:
    """Return the message of an error in parsing, with its line if it is in an experiment file."""
    cause: BaseException | None = error
    while cause is not None:  # a wrapping exception has the original traceback only as text
        frames = traceback.extract_tb(cause.__traceback__)
        inside = [frame for frame in frames if Path(frame.filename) in experiments]
        if inside and isinstance(cause, UserError):
            return str(cause)
        if inside:
            kind = type(cause).__name__
            return f"{inside[-1].filename}, line {inside[-1].lineno}: {kind}: {_said(cause)}"
        cause = cause.__context__
    return _said(error)


def _said(error: BaseException) -> str:
    one_line = isinstance(error, (OSError, SyntaxError))
    said = str(error) if one_line or not error.args else str(error.args[0])
    return said or type(error).__name__


def _check_text(argv: Sequence[str]) -> None:
    """Fail on arguments that are not UTF-8: the libraries that save files reject such names."""
    for argument in argv:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            _fail(f"the argument {argument[:80]!a} is not UTF-8")


def _experiments(argv: Sequence[str]) -> list[Path]:
    """Return the files in arguments --config=FILE:variant."""
    words = zip(argv, [*argv[1:], ""], strict=True)
    pairs = [(*word.partition("=")[::2], "=" in word, after) for word, after in words]
    values = [
        value if has_value else after
        for name, value, has_value, after in pairs
        if name in ("-config", "--config")
    ]
    return [Path(value.split(":")[0]) for value in values if value]


def _check_experiment(path: Path) -> None:
    """Fail on an unknown experiment; the message lists all experiments."""
    if not os.path.isfile(path):
        beside = [p.stem for p in path.parent.glob("[!_]*.py")] if len(path.parts) > 1 else []
        known = ", ".join(sorted(beside) or bundled.experiments())
        _fail(f"there is no experiment {path}; there are {known}, as nrgpt train NAME")


def _check_fields(argv: Sequence[str]) -> None:
    """Fail on an unknown or renamed field; the message suggests similar fields."""
    fields = field_names(default_config())
    for argument in argv:
        name = argument.partition("=")[0].lstrip("-")
        name = name.removeprefix("no") if name.startswith("noconfig.") else name
        field = name.removeprefix("config.")
        if name.startswith("config.") and field in RENAMED:
            _fail(f"--config.{field} is --config.{RENAMED[field]} by now")
        if name.startswith("config.") and field not in fields:
            last = field.rpartition(".")[2]
            near = [f for f in fields if f.rpartition(".")[2] == last]
            near = near or difflib.get_close_matches(field, fields, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "there are " + ", ".join(fields)
            )
            _fail(f"unknown field --config.{field}; {hint}")


def _fail(message: str, code: int = MISTAKE) -> NoReturn:
    line = " ".join(masked(message).split())
    sys.stderr.write(f"error: {line}\n")
    sys.exit(code)


def define_config_flag() -> flags.FlagHolder:
    """Define --config=experiments/NAME.py[:variant] and --config.field=value."""
    return config_flags.DEFINE_config_file("config", lock_config=True)


def define_changes_flag() -> flags.FlagHolder:
    """Define --config.field=value for all configurations; `changes` returns the values set."""
    _read_arguments()
    _check_fields(sys.argv)  # config_flags reads the arguments at definition, before parsing
    return config_flags.DEFINE_config_dict("config", default_config(), "Changed in every run.")


def changes(holder: flags.FlagHolder) -> dict[str, Any]:
    """Return the values set by a flag of `define_changes_flag`, by dotted field name."""
    return {**config_flags.get_override_values(flags.FLAGS[holder.name]), **_options}


def define_workdir_flag() -> flags.FlagHolder:
    """Define --workdir=DIR, the run directory."""
    holder = flags.DEFINE_string("workdir", None, "Run directory.", required=True)
    flags.register_validator("workdir", _is_folder, "a run directory is a folder with a name")
    return holder


def _is_folder(workdir: str | None) -> bool:
    if workdir is not None and "://" in workdir and not paths.on_bucket(workdir):
        raise flags.ValidationError("a run directory is a folder, or gs://BUCKET/FOLDER")
    return workdir is None or (bool(workdir.strip()) and "\0" not in workdir)
