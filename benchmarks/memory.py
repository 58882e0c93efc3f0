"""Memory and compilation time of a training step against context length and recurrent steps.

    python -m benchmarks.memory

The memory is that of XLA's plan for the compiled step: temporaries, without parameters and
optimizer. Prints a JSON list.
"""

import json
import time
from collections.abc import Mapping

import jax

from benchmarks.cases import Case
from nrgpt_jax.array_types import Batch
from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.training import optimizers
from nrgpt_jax.training import step as training

TOKENS = 4096  # a batch

ROWS: tuple[Mapping[str, object], ...] = (
    *(
        {"context_length": n, "implementation": k}
        for k in ("fused", "autodiff")
        for n in (256, 512, 1024)
    ),
    *({"num_steps": t, "remat": r} for r in ("none", "step", "full") for t in (6, 24, 48)),
)


def measure(fields: Mapping[str, object]) -> dict[str, object]:
    """One row: the size `small` with these fields changed."""
    config = Case("small", "NRGPT_H_FF2W", 16).config()
    config.model.update({"scan_unroll": 1, **fields})
    mesh, model = sharding.make_mesh(), create_model(config)
    optimizer = optimizers.create_optimizer(config.optimizer, 1000, parameter_specs(model))
    step = training.make_train_step(model, optimizer, 0, 1, mesh)
    state = jax.eval_shape(lambda: training.create_state(model, optimizer, 0, mesh))
    shape = TOKENS // config.model.context_length, config.model.context_length
    batch = Batch(*(jax.ShapeDtypeStruct(shape, t) for t in ("int32", "int32", "float32")))  # type: ignore[arg-type]
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - begin
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {**fields, "temporaries_mb": round(megabytes, 1), "compile_seconds": round(seconds, 2)}


if __name__ == "__main__":
    measure(ROWS[0])  # the first compilation of a process takes longer
    print(json.dumps([measure(row) for row in ROWS]))
