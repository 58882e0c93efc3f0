"""Memory and compilation time of a training step against context length and recurrent steps.

    python -m benchmarks.memory

The memory is the temporaries in XLA's plan for the compiled step, without parameters and optimizer
state. Prints a JSON list.
"""

import json
import time
from collections.abc import Mapping

from benchmarks.cases import Case
from nrgpt_jax.models import sharding
from studies.measures import training_step

TOKENS = 4096  # per batch

ROWS: tuple[Mapping[str, object], ...] = (
    *(
        {"context_length": n, "implementation": k}
        for k in ("fused", "autodiff")
        for n in (256, 512, 1024)
    ),
    *({"num_steps": t, "remat": r} for r in ("none", "step", "full") for t in (6, 24, 48)),
)


def measure(fields: Mapping[str, object]) -> dict[str, object]:
    """Measure one row: the size `small` with these fields changed."""
    config = Case("small", "NRGPT_H_FF2W", 16).config()
    config.model.update({"scan_unroll": 1, **fields})
    config.data.batch_size = TOKENS // config.model.context_length
    _, step, state, batch = training_step(config, sharding.make_mesh())
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - begin
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {**fields, "temporaries_mb": round(megabytes, 1), "compile_seconds": round(seconds, 2)}


if __name__ == "__main__":
    measure(ROWS[0])  # the first compilation of a process takes longer
    print(json.dumps([measure(row) for row in ROWS]))
