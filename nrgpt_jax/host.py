"""Settings of the process that make training fast, made before JAX starts its backends."""

import contextlib
import ctypes
import os
from pathlib import Path

import jax

MOST_CPU_DEVICES = 8
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
_WAIT = "--xla_cpu_collective_call_{}_timeout_seconds={}"


def use_all_cores(windows_at_once: int) -> None:
    """Prepares for training on CPUs; what runs on an accelerator is not affected.

    On CPUs, XLA runs a batched product and most elementwise passes on one thread, so the batch
    is split over one device a core (eight at most). And it allocates its temporaries anew each
    step; the C library is told to keep them, because page faults cost as much as the arithmetic.
    Once JAX has started its backends, the devices stay as they are.

    Args:
      windows_at_once: windows that are worked on together; the devices must divide them.
    """
    _keep_freed_memory()
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    # A run that is suspended (Ctrl-Z, a closed laptop) must not look stuck when it goes on.
    waits = _WAIT.format("warn_stuck", 3600), _WAIT.format("terminate", 10**6)
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *waits])
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", _cpu_devices(windows_at_once, _cores()))


def cache_compilations(workdir: Path | str) -> None:
    """Keeps compiled programs in `cache/` of a run directory, for the next start."""
    jax.config.update("jax_compilation_cache_dir", str(Path(workdir) / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def free_memory() -> int | None:
    """Bytes that new arrays can have on the first device, if that can be known."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    with contextlib.suppress(OSError):  # another system than Linux
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _cpu_devices(windows_at_once: int, cores: int) -> int:
    most = max(1, min(cores, MOST_CPU_DEVICES))
    return max(n for n in range(1, most + 1) if windows_at_once % n == 0)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
