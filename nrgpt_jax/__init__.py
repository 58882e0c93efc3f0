"""NRGPT in JAX: language models whose tokens descend an energy landscape.

import nrgpt_jax as nrgpt

model = nrgpt.create_model(name="NRGPT_H_FF2W", vocab_size=65)
variables = jax.jit(model.init)(jax.random.key(0), tokens)
loss, aux = nrgpt.loss_fn(model, variables["params"], tokens)
"""

import importlib

from nrgpt_jax import interrupts

__version__ = "0.2.0"

if interrupts.is_program():  # for Ctrl-C during the imports, which take seconds
    interrupts.end_at_once()

_HOMES = {
    # models
    "create_model": "models",
    "default_config": "configs",
    # training
    "Batch": "array_types",
    "loss_fn": "training.losses",
    "train": "training.loop",
    # trained models and text
    "Convergence": "core.descent",
    "Sampling": "generation.sampling",
    "Settings": "generation.generate",
    "generate": "generation.generate",
    "load_pretrained": "runs.pretrained",
    "log_likelihood": "generation.scoring",
    "save_pretrained": "runs.pretrained",
    # registration of parts, and the specs of their parameters
    "attention": "core.energies",
    "combination": "core.block",
    "constant": "core.parameters",
    "dataset": "datasets",
    "energy": "core.energies",
    "evaluator": "models.evaluators",
    "feedforward": "core.energies",
    "fixed": "core.parameters",
    "matrix": "core.parameters",
    "metric": "core.metrics",
    "positive": "core.parameters",
    "rule": "core.rules",
    "tokenizer": "datasets.tokenizers",
    "vector": "core.parameters",
}
__all__ = list(_HOMES)


def __dir__():
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str):
    if name in _HOMES:  # imported on demand: configurations need no JAX
        return getattr(importlib.import_module(f"nrgpt_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
