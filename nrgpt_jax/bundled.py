"""What comes along with the package: experiments, task files, and small trained models.

An installed package has them in its folder `bundled`; in a checkout they are at its root.
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
    """The names of the experiments, those of this folder among them."""
    folders = Path("experiments"), EXPERIMENTS
    return sorted({path.stem for folder in folders for path in folder.glob("[!_]*.py")})


def experiment(name: str) -> Path:
    """The file of an experiment: of that name, or in `experiments/` here or of the package."""
    path = Path(name)
    if path.suffix == ".py" or len(path.parts) > 1:
        return path
    here = Path("experiments") / f"{name}.py"
    return here if here.exists() else EXPERIMENTS / f"{name}.py"


def tasks() -> list[str]:
    """The names of the task files of `nrgpt launch`."""
    files = TASKS.glob("*.yaml")
    return sorted(path.stem for path in files if "\nrun:" in path.read_text())


def task(name: str) -> Path:
    """The task file of a name, in `launch/` here or of the package, or of that path."""
    if name.endswith(".yaml"):
        return Path(name)
    here = Path("launch") / f"{name}.yaml"
    return here if here.exists() else TASKS / here.name


def runs() -> list[str]:
    """The names of the trained models."""
    return sorted(path.name for path in RUNS.glob("*") if path.is_dir())


def run(name: str | Path) -> Path:
    """The folder of a run: of that name, or in `runs/`, or else of a trained model."""
    folder = paths.as_path(name)
    if len(folder.parts) == 1 and not folder.exists():
        return next((f for f in (Path("runs") / name, RUNS / name) if f.is_dir()), folder)
    return folder


def copied_run(name: str) -> Path:
    """The same, a trained model as a copy in `runs/pretrained`: programs write beside a model."""
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
