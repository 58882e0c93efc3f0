"""One side of a comparison, in its own process: answers each input line with one line.

    python -m benchmarks.worker '{"case": 0, "side": "ours", "release": null}'

Each turn measures `STEPS` steps after an unmeasured one, so that the caches and waiting threads of
the other side do not count. The line `profile` requests the operations of `STEPS` steps instead,
from our side only.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import CASES, Case

STEPS = 3


def main(case: int, side: str, release: str | None) -> None:
    """Build the step of a side (ours, or the release's, eager or compiled) and measure it."""
    begin, about = time.perf_counter(), dict[str, Any]()
    if release:
        from benchmarks.release import training_step

        compiled = side == "compiled"
        step = training_step(release, CASES[case].config(), _tokens(CASES[case]), compiled)
    else:
        step, about = _ours(CASES[case])
    step()
    _answer({"first_step_seconds": time.perf_counter() - begin, **about})
    for line in sys.stdin:
        step()
        if line.strip() == "profile":
            from benchmarks.operations import profile

            _answer(profile(step, STEPS))
            continue
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        _answer({"times": times, "peak_memory": _peak_memory(bool(release))})


def _answer(fields: dict) -> None:
    print(json.dumps(fields), flush=True)


def _tokens(case: Case) -> np.ndarray:
    m = case.config().model
    shape = case.batch, m.context_length + 1
    return np.random.default_rng(0).integers(0, m.vocab_size, shape).astype(np.int32)


def _ours(case: Case) -> tuple[Callable[[], float], dict]:
    from nrgpt_jax import host

    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory too
    config = case.config()
    host.use_all_cores(config.data.batch_size // config.optimizer.accumulation_steps)
    import jax

    from nrgpt_jax.models import flops, sharding
    from studies.measures import training_step

    model, function, state, batch = training_step(config, sharding.make_mesh(), _tokens(case))
    compiled = function.lower(state, batch).compile()
    about: dict[str, Any] = {"devices": jax.device_count()}
    about["peak_flops"] = flops.peak_flops() or float("nan")
    about["flops_per_token"] = flops.train_flops_per_token(model)
    about["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["train/loss"])

    return step, about


def _peak_memory(of_torch: bool) -> float:
    """Return the peak bytes of the accelerator, or of this process on a CPU."""
    if of_torch:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        import jax

        statistics = jax.devices()[0].memory_stats()
        if statistics:
            return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
