"""Files bundled with the package: experiments, task files, and small trained models.

An installed package has experiments and task files in its folder `bundled`, a checkout at its root.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from nrgpt_jax import paths

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE / "bundled" if (_PACKAGE / "bundled").is_dir() else _PACKAGE.parent
EXPERIMENTS, TASKS = _ROOT / "experiments", _ROOT / "launch"
RUNS = _PACKAGE / "pretrained"


def experiments() -> list[str]:
    """Return the names of all experiments, including those in the current folder."""
    folders = Path("experiments"), EXPERIMENTS
    return sorted({path.stem for folder in folders for path in folder.glob("[!_]*.py")})


def experiment(name: str) -> Path:
    """Return the file of an experiment: a path, or a name in `experiments/` here or bundled."""
    path = Path(name)
    if path.suffix == ".py" or len(path.parts) > 1:
        return path
    here = Path("experiments") / f"{name}.py"
    return here if here.exists() else EXPERIMENTS / f"{name}.py"


def tasks() -> list[str]:
    """Return the names of the bundled task files of `nrgpt launch`."""
    files = TASKS.glob("*.yaml")
    return sorted(path.stem for path in files if "\nrun:" in path.read_text())


def task(name: str) -> Path:
    """Return a task file: a path, or a name in `launch/` here or bundled."""
    if name.endswith(".yaml"):
        return Path(name)
    here = Path("launch") / f"{name}.yaml"
    return here if here.exists() else TASKS / here.name


def runs() -> list[str]:
    """Return the names of the bundled trained models."""
    return sorted(path.name for path in RUNS.glob("*") if path.is_dir())


def run(name: str | Path) -> Path:
    """Return the folder of a run: a path, a name in `runs/`, or a bundled model."""
    folder = paths.as_path(name)
    if len(folder.parts) == 1 and not folder.exists():
        return next((f for f in (Path("runs") / name, RUNS / name) if f.is_dir()), folder)
    return folder


def copied_run(name: str) -> Path:
    """Return `run(name)`, a bundled model as a copy in `runs/pretrained`, for results beside it."""
    folder = run(name)
    if folder.parent != RUNS:
        return folder
    copy = Path("runs/pretrained") / folder.name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as partial:
            shutil.copytree(folder, Path(partial) / "copy")
            (Path(partial) / "copy").rename(copy)
        sys.stderr.write(f"the model {name}, which comes along, is copied to {copy}\n")
    return copy
