"""Preparing the process for training."""

import json
import os
import subprocess
import sys

import pytest

from nrgpt_jax import host


@pytest.mark.parametrize(
    ("windows", "cores", "devices"), [(16, 2, 2), (3, 2, 1), (12, 8, 6), (64, 96, 8), (5, 4, 1)]
)
def test_devices_divide_the_windows(windows, cores, devices):
    assert host._cpu_devices(windows, cores) == devices


PROGRAM = """
import json, os, jax
from nrgpt_jax import host
host.cores = lambda: 4
host.use_all_cores(8)
print(json.dumps([jax.device_count(), os.environ.get("XLA_FLAGS", "")]))
"""


def prepared(**environment):
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout)


def test_a_device_a_core():
    count, flags = prepared(XLA_FLAGS="--xla_dump_to=")
    assert count == 4
    assert flags.startswith("--xla_dump_to= --xla_cpu_collective_call_warn_stuck")


def test_the_users_choice_stands():
    chosen = "--xla_force_host_platform_device_count=3"
    assert prepared(XLA_FLAGS=chosen) == [3, chosen]


CACHING = """
import sys, jax
from nrgpt_jax import host
host.cache_compilations(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x + 1.0)(1.0)
"""


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_programs_are_kept_in_the_run_directory_or_where_runs_share_them(tmp_path, shared):
    run, folder = tmp_path / "run", tmp_path / "shared"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder)}
    if not shared:
        del environment["JAX_COMPILATION_CACHE_DIR"]
    subprocess.run([sys.executable, "-c", CACHING, str(run)], env=environment, check=True)
    assert any((folder if shared else run / "cache").iterdir())
    assert not (run / "cache" if shared else folder).exists()
