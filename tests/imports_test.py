"""Programs beside the package import nothing that is no longer there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OWN = ("nrgpt_jax", "benchmarks", "studies")


def names_imported(path):
    """Modules of this repository, each with the names taken from it, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_what_programs_import_is_there():
    """Read, not run: programs define flags of the same names, and some need torch."""
    paths = [path for folder in ("benchmarks", "studies") for path in (ROOT / folder).rglob("*.py")]
    for module, name in {imported for path in paths for imported in names_imported(path)}:
        if module.partition(".")[0] in OWN:
            found = importlib.import_module(module)
            if name and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")


def test_experiments_build_on_each_other_in_one_direction():
    """A file imports only files that do not import it, however far away."""
    files = {path.stem: path for path in (ROOT / "experiments").glob("*.py")}
    of_file = {
        stem: {
            part
            for module, name in names_imported(path)
            for part in (module.rpartition(".")[2], name)
            if module.startswith("experiments") and part in files
        }
        for stem, path in files.items()
    }

    def reached(stem, through=()):
        assert stem not in through, f"{' -> '.join((*through, stem))}"
        for other in of_file[stem]:
            reached(other, (*through, stem))

    for stem in files:
        reached(stem)


def test_what_computes_a_loss_reads_no_data():
    heavy = "grain", "tensorflow_datasets", "fsspec", "orbax", "chex"
    modules = "nrgpt_jax.training.losses, nrgpt_jax.models"
    code = f"import sys, {modules}; print(*({{*{heavy}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()
