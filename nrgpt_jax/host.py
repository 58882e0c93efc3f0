"""Process settings for fast training, applied before JAX starts its backends."""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

import jax

from nrgpt_jax import paths
from nrgpt_jax.errors import UserError

MOST_CPU_DEVICES = 8
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h
COUNTS_OF_PROCESSES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_WAIT = "--xla_cpu_collective_call_{}_timeout_seconds={}"


def join(address: str | None, num_processes: int | None, process_id: int | None) -> int:
    """Join the other processes of a run, before JAX starts its backends.

    On TPUs, under SLURM's `srun` and under Open MPI, JAX detects the processes. Elsewhere, without
    flags, this is the only process.

    Args:
      address: `host:port` of process 0, if JAX cannot detect it.
      num_processes, process_id: number of processes, and index of this one.

    Returns:
      The number of processes; on TPUs, where the settings of this module do not depend on it, 1.

    Raises:
      UserError: some of the flags are missing, or the other processes cannot be reached.
    """
    settings = [address, num_processes, process_id]
    if settings.count(None) not in (0, len(settings)):
        raise UserError("give all of --coordinator_address, --num_processes and --process_id")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    counts = [os.environ.get(name, "") for name in COUNTS_OF_PROCESSES]
    count = num_processes or max(int(count) if count.isdigit() else 1 for count in counts)
    if count == 1 and address is None and not _has_tpu():
        return 1
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot join the other processes at {address or 'the address that JAX found'}: "
            f"{reason}; start all of them with the same command"
        ) from None
    return count


def _has_tpu() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def use_all_cores(windows_at_once: int) -> None:
    """Prepare for training on CPUs; accelerators are not affected.

    On CPUs, XLA runs a batched product and most elementwise passes on one thread, so the batch
    is split over one device per core (eight at most). XLA also allocates its temporaries in every
    step; the C library is set to keep freed memory, because page faults cost as much as the
    arithmetic. Once JAX has started its backends, the devices no longer change.

    Args:
      windows_at_once: windows in one batch part; the number of devices must divide it.
    """
    _keep_freed_memory()
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    # A suspended run (Ctrl-Z, a closed laptop) must not look stuck when it continues.
    waits = _WAIT.format("warn_stuck", 3600), _WAIT.format("terminate", 10**6)
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *waits])
    with contextlib.suppress(RuntimeError):  # JAX has started its backends
        jax.config.update("jax_num_cpu_devices", _cpu_devices(windows_at_once, cores()))


def cache_compilations(workdir: Path | str) -> None:
    """Set the persistent compilation cache to `cache/` of a run directory.

    JAX_COMPILATION_CACHE_DIR overrides it, for a cache shared by many runs. For a run directory on
    a bucket, there is no other cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or paths.on_bucket(workdir):
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(workdir) / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def free_memory() -> int | None:
    """Return the free memory of the first device of this process, in bytes; None if unknown."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    with contextlib.suppress(OSError):  # another system than Linux
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _cpu_devices(windows_at_once: int, cores: int) -> int:
    limit = max(1, min(cores, MOST_CPU_DEVICES))
    return max(n for n in range(1, limit + 1) if windows_at_once % n == 0)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
