"""Strict numerics, two fake CPU devices, and a data cache that no test shares with the user."""

import os

from studies.programs import compiled_fast

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda runs them on a GPU
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {compiled_fast()}"

import jax
import pytest
from jaxtyping import install_import_hook
from strictness import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

# Every shape and type in an annotation is checked when its function is called.
_rooms = [f"nrgpt_jax.{room}" for room in ("core", "ops", "models")]
install_import_hook([*_rooms, "nrgpt_jax.analysis.landscape"], "annotations.checked")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", False)


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that all workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Many tests compile the same programs: all workers share them, and so do their processes.

    These in a folder of their own, as they may be killed while they write to it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled_by_processes")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture(scope="session", autouse=True)
def _data_cache(tmp_path_factory):
    os.environ["NRGPT_CACHE_DIR"] = str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def standard_promotion():
    """optax mixes types on purpose; its users cannot be tested strictly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
