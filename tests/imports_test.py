"""Programs beside the package import nothing that is no longer there."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "studies")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OWN = ("nrgpt_jax", "benchmarks", "studies")


def names_imported(path):
    """Modules of this repository, each with the names taken from it, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_program_imports_is_there(program):
    """Read, not run: programs define flags of the same names, and some need torch."""
    for module, name in names_imported(ROOT / program):
        if module.partition(".")[0] in OWN:
            found = importlib.import_module(module)
            if name and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
