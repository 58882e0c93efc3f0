"""The built wheel in an environment of its own, from an empty folder: a researcher's day."""

import json
import re
import shlex
import shutil
import site
import subprocess
import sys
import venv

import numpy as np
import pytest
from pages_helpers import ROOT, blocks
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

SMALL = (
    *("--config.train_steps=4", "--config.eval_every=4", "--config.log_every=2"),
    *("--config.eval_prompts=2", "--config.eval_windows=2", "--config.data.batch_size=4"),
    "--config.optimizer.accumulation_steps=1",
)
LISTOPS = ("--config.data.listops.num_train=400", "--config.data.listops.num_test=8")
SWEEP = """
from nrgpt_jax.configs import default_config, with_seeds


def get_config(variant=""):
    config = default_config()
    config.plugins = ("plugin_parts",)
    config.step_metrics, config.evaluators = ("descent_rate",), ("confidence",)
    config.model.update({"name": "NRGPT_H_HOPFIELD", "rule": "damped", "mask": "strict"})
    config.model.update({"context_length": 8, "embed_dim": 8, "num_steps": 2})
    config.data.update({"name": "reverse", "batch_size": 4})
    config.optimizer.name = "lion"
    return config


def get_sweep(scale=""):
    configs = {}
    for power in (2.0, 3.0):
        configs[f"power_{power:.0f}"] = get_config()
        configs[f"power_{power:.0f}"].model.options.power = power
    return with_seeds(configs, 2)
"""


class Installed:
    """An environment with the wheel, beside what these tests run with."""

    def __init__(self, folder):
        self.folder, self.bin = folder / "work", folder / "env/bin"
        self.folder.mkdir()
        source = folder / "source"
        for name in ("nrgpt_jax", "experiments", "launch"):
            shutil.copytree(ROOT / name, source / name)
        for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", "dist", "."]
        done = subprocess.run(build, cwd=source, capture_output=True, text=True)
        if done.returncode and "No matching distribution" in done.stderr:
            pytest.skip("building a wheel needs setuptools>=77 from a package index")
        assert done.returncode == 0, done.stderr
        venv.create(folder / "env", with_pip=True)
        [packages] = (folder / "env/lib").glob("python*/site-packages")
        [wheel] = (source / "dist").glob("*.whl")
        self.run("python", "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def run(self, program, *arguments, code=0):
        """What it prints."""
        command = [str(self.bin / program), *arguments]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=environment
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    result = Installed(tmp_path_factory.mktemp("wheel"))
    where = result.run("python", "-c", "import nrgpt_jax; print(nrgpt_jax.__file__)")
    assert str(result.bin.parent) in where
    return result


def test_the_page_runs_outside_of_the_checkout(installed):
    """Its own energy too: trained, sampled and analyzed by other processes."""
    *first, energy, last = blocks("docs/library.md", "python")
    (installed.folder / "my_energies.py").write_text(energy)
    (installed.folder / "page.py").write_text("\n".join([*first, last]))
    assert re.search(r"loss 0\.\d+ nats|loss 1\.\d+ nats", installed.run("python", "page.py"))
    bash = blocks("docs/library.md", "bash")[0]
    train, sample, analyze = (shlex.split(line)[1:] for line in bash.splitlines())
    installed.run("nrgpt", *train, *SMALL, *LISTOPS)
    assert "max_5,(,1,4,),=" in installed.run("nrgpt", *sample)
    assert "guarantee" in installed.run("nrgpt", *analyze).lower()


def test_a_researchers_day(installed):
    """Parts in one file, runs in another; nothing inside of the package is touched."""
    shutil.copy(ROOT / "tests/plugin_parts.py", installed.folder)
    (installed.folder / "sweep.py").write_text(SWEEP)
    few = ("--config.train_steps=4", "--config.eval_every=4", "--config.checkpoint_every=4")
    installed.run("nrgpt", "sweep", "sweep.py", *few)
    runs = sorted((installed.folder / "runs/sweep").glob("*/*/config.json"))
    assert len(runs) == 4
    powers = {json.loads(path.read_text())["model"]["options"]["power"] for path in runs}
    assert powers == {2.0, 3.0}
    run = "runs/sweep/power_3/0"
    lines = (installed.folder / run / "metrics.jsonl").read_text()
    assert "train/descent_rate/1" in lines
    assert "val/confidence" in lines
    assert "reverse" in installed.run("nrgpt", "evaluate", run)
    installed.run("nrgpt", "analyze", run, "--prompt=a,b,c,=")
    installed.run("nrgpt", "export", run, "--out=exported")
    weights = load_file(installed.folder / "exported/model.safetensors")
    assert np.isfinite(weights["block/feedforward/W"]).all()
    assert installed.run("nrgpt", "sample", "exported", "--prompt=a,b,=")
    file = installed.folder / "plugin_parts.py"
    file.write_text(file.read_text().replace("** power) / power", "** power) * power"))
    assert "another definition of energy HOPFIELD" in installed.run(
        "nrgpt", "sample", "exported", "--prompt=a,b,="
    )
    file.unlink()
    gone = installed.run("nrgpt", "sample", "exported", "--prompt=a,b,=", code=2)
    assert "plugin_parts" in gone


def test_what_comes_along(installed):
    """Experiments without a checkout; mistakes in one line."""
    installed.run("nrgpt", "train", "listops:demo", *SMALL, *LISTOPS)
    assert (installed.folder / "runs/listops-demo/config.json").is_file()
    assert "listops" in installed.run("nrgpt", "train", "nothing", code=2)
    assert "checkout" in installed.run("nrgpt", "bench", code=2)
    split = ("--config.mesh.tensor=8", "--config.optimizer.accumulation_steps=1")
    shown = ("--target=tpu", "--bucket=gs://b", "--dry_run", *split)
    assert 'PACKAGE: "nrgpt-jax"' in installed.run("nrgpt", "launch", "listops", *shown)
