"""Models with guaranteed descent against models without, at equal parameters.

    make train EXP=frontier:FFG_exact_sphere_injection WORKDIR=runs/frontier/x/0

The sizes of `quality:small` (tiny Shakespeare by characters, D=128, 4 steps, 2,000 training steps
of 12 x 64 characters, Muon), low-rank rotary attention, and an `mlp_ratio` that gives each model
the parameter count of GPT_Rec_parallel.

Variants (`--config=experiments/frontier.py:ENERGY_DESCENT_TERMS` or `...@LEARNING_RATE`):
    ENERGY   a feed-forward energy whose gradient is exact: FF2W, FFG_exact, FFG_first, FF3
    DESCENT  full (no guarantee); sphere, projected (rate psd), scalar: guaranteed, strict mask
    TERMS    plain, injection, leak (with the injection)
"""

from functools import partial
from itertools import product

from experiments.quality import MUON, ROPE, fitting_ratio, parameters, small
from nrgpt_jax.configs import apply_variant, default_config

ENERGIES = ("FF2W", "FFG_exact", "FFG_first", "FF3")
STRICT = {"model.mask": "strict"}
PSD = {"model.inference_rate": "psd", **STRICT}
DESCENTS = {
    "full": {},
    "sphere": {"model.rule": "sphere", **PSD},
    "projected": {"model.rule": "projected", **PSD},
    "scalar": {"model.inference_rate": "scalar", **STRICT},
}
TERMS = {"plain": (), "injection": ("injection",), "leak": ("injection", "leak")}


def get_config(variant: str = "FFG_exact_sphere_injection"):
    config = default_config()
    config.experiment = "frontier"
    name, _, rate = variant.partition("@")
    parts = {"_".join(p): partial(change, *p) for p in product(ENERGIES, DESCENTS, TERMS)}
    apply_variant(config, name, parts | {"GPT_Rec_parallel": recurrent})
    config.optimizer.learning_rate = float(rate or 2e-3)
    config.optimizer.final_learning_rate = 0.1 * config.optimizer.learning_rate
    return config


def recurrent(config):
    small(config)
    config.update_from_flattened_dict({"model.name": "GPT_Rec_parallel", **MUON})


def change(energy, descent, terms, config):
    recurrent(config)
    count = parameters(config.model)
    config.update_from_flattened_dict({**ROPE, **DESCENTS[descent]})
    config.model.name = f"NRGPT_H_{energy}"
    config.model.energies = TERMS[terms]
    config.model.mlp_ratio = fitting_ratio(config.model, count)
