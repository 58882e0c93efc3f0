"""Programs in processes of their own: those of the package, and Python with other devices."""

import os
import subprocess
import sys

from studies.programs import ROOT, Done, Running, program
from studies.programs import devices as with_devices

__all__ = ["Done", "Running", "program", "run_python"]


def run_python(code: str, devices: int) -> str:
    """What a program that may import these tests prints, with so many fake devices."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    flags = with_devices(devices, os.environ["XLA_FLAGS"])
    environment = {**os.environ, **flags, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
