"""Plugins: user modules that register energies, rules, data sets and other parts.

`config.plugins = ("my_package.energies",)` names them. They are imported wherever the configuration
is read: at the start of programs, in the workers of a sweep, and when a run is opened. A run
records the module and a checksum of the source of each such part, to detect another definition
under the same name.
"""

import hashlib
import importlib
import importlib.machinery
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging

from nrgpt_jax.errors import UserError
from nrgpt_jax.registry import Registry

_PACKAGE = __name__.partition(".")[0]
_LAYOUT = {tokenize.COMMENT: "", tokenize.NL: "", tokenize.NEWLINE: "\n"}
_LAYOUT |= {tokenize.INDENT: "{", tokenize.DEDENT: "}"}  # of any width
Parts = Mapping[str, Mapping[str, str]]
"""`{"energy CUBIC": {"module": "my_energies", "checksum": "..."}}`"""


def load(names: Iterable[str]) -> None:
    """Import plugins, also from the current folder. Raises UserError naming one that fails."""
    for name in names:
        if sys.modules.get(name) is not None:
            continue
        if "" not in sys.path:
            sys.path.append("")
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            missing = isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name))
            cure = "install it, or start where it lies (PYTHONPATH)" if missing else "mend it"
            raise UserError(f"the plugin {name} cannot be imported ({reason}); {cure}") from None


def describe(chosen: Iterable[tuple[Registry, str]]) -> dict[str, dict[str, str]]:
    """Return the records of the parts that are not defined in this package."""
    result = {}
    for registry, name in chosen:
        source = registry.sources[name]
        module = _module(source)
        if module.partition(".")[0] != _PACKAGE:
            record = {"module": module, "checksum": checksum(source)}
            result[f"{registry.kind} {name}"] = record
    return result


def check_importable(parts: Parts) -> None:
    """Raise UserError for a part defined in a file that cannot be imported, such as an experiment.

    The run could not be opened without it.
    """
    for part, record in parts.items():
        module = record["module"]
        if module == "__main__":
            continue
        if not importlib.machinery.PathFinder.find_spec(module.partition(".")[0]):
            raise UserError(
                f"{part} is registered in a file that is no module of its own ({module}); move it "
                "to one, and name that in config.plugins, so that the run can be opened"
            )


def import_parts(recorded: Parts) -> None:
    """Import the modules of recorded parts. Raises UserError for a part that cannot be imported."""
    for part, record in recorded.items():
        if record["module"] == "__main__":
            continue  # a script or notebook registers its parts again
        try:
            load([record["module"]])
        except UserError as error:
            raise UserError(f"{part} of this run is of another module: {error}") from None


def compare(where: str, recorded: Parts, present: Parts) -> None:
    """Warn, with one line per part, of definitions that have changed since a run was recorded."""
    for part, record in recorded.items():
        here = present.get(part)
        if here is None or not record["checksum"] or not here["checksum"]:
            continue
        if here["checksum"] != record["checksum"]:
            text = "%s was trained with another definition of %s than that of %s: results differ"
            logging.warning(text, where, part, here["module"])


def checksum(source: Any) -> str:
    """Return the checksum of a source without comments and layout; "" if there is no source.

    The source is a function, a class, or a tuple, of which the functions count.
    """
    try:
        if isinstance(source, tuple):
            texts = [inspect.getsource(part) for part in source if callable(part)]
        else:
            texts = [inspect.getsource(source)]
        text = "\n".join(textwrap.dedent(text) for text in texts)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return ""
    written = [_LAYOUT.get(token.type, token.string) for token in tokens]
    return hashlib.sha256(repr([word for word in written if word]).encode()).hexdigest()[:16]


def _module(source: Any) -> str:
    if isinstance(source, tuple):
        source = next((part for part in source if callable(part)), None)
    return getattr(source, "__module__", None) or _PACKAGE
