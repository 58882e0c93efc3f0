"""Ablations of NRGPT at equal parameters, with transformers as baselines.

    make train EXP=quality:small_full WORKDIR=runs/quality/small_full/0
    make quality      # all of them, then the table (docs/results/quality.md)

Tiny Shakespeare by characters, with the sizes of nanoGPT's recipe for CPUs: 4 heads, 4 steps,
batches of 12 x 64 characters; D=128 and 2,000 training steps (`small`), or 192 and 1,000 (`large`).
AdamW (or Muon) with weight decay 0.1, 100 warm-up steps, cosine decay to a tenth of the learning
rate, no dropout. `mlp_ratio` is chosen so that all models of a size have the parameter count of its
GPT_Rec_parallel, within 1%.

Variants (`--config=experiments/quality.py:SIZE_WAY` or `:SIZE_WAY@LEARNING_RATE`):
    SIZE  small, large
    WAY   one of `WAYS` (names ending in _muon are trained by Muon)
"""

from functools import partial

from nrgpt_jax.configs import apply_variant, default_config
from nrgpt_jax.models import create_model, num_parameters

MUON = {"optimizer.name": "muon"}
ROPE = {"model.attention": "low_rank_rope"}
SCALAR = {"model.inference_rate": "scalar"}
WAYS = {
    "GPT_Rec_parallel": {"model.name": "GPT_Rec_parallel"},
    "GPT_Rec": {"model.name": "GPT_Rec"},
    "GPT": {"model.name": "GPT"},  # at half the width
    "full": {},
    # rates and rules
    "scalar": SCALAR,
    "psd": {"model.inference_rate": "psd"},
    "projected": {"model.inference_rate": "psd", "model.rule": "projected"},
    "momentum": {"model.rule": "momentum"},  # `full` is its control, with one parameter less
    "step_scales": {"model.per_step_scale": True},
    "layer_norm": {"model.norm": "layer_norm"},
    # energies
    "low_rank": {"model.attention": "low_rank"},
    "low_rank_rope": ROPE,
    "full_rank_rope": {"model.attention": "full_rank_rope"},
    "temperatures": {"model.learn_alpha": True, "model.learn_beta": True},
    "FFG": {"model.name": "NRGPT_H_FFG"},
    "mixture": {"model.combination": "mixture"},
    "injection": {"model.energies": ("injection",)},
    "blocks": {"model.attention": "low_rank", "model.num_distinct_layers": 2, **SCALAR},
    # optimizer
    "full_muon": MUON,
    "GPT_Rec_parallel_muon": {"model.name": "GPT_Rec_parallel", **MUON},
    "GPT_Rec_muon": {"model.name": "GPT_Rec", **MUON},
    "GPT_muon": {"model.name": "GPT", **MUON},
    # together
    "low_rank_rope_scalar": {**ROPE, **SCALAR},
    "low_rank_rope_FFG": {**ROPE, "model.name": "NRGPT_H_FFG"},
    "low_rank_rope_muon": {**ROPE, **MUON},
    "low_rank_rope_blocks_muon": {**ROPE, **SCALAR, **MUON, "model.num_distinct_layers": 2},
    "low_rank_rope_FFG_muon": {**ROPE, **MUON, "model.name": "NRGPT_H_FFG"},
    "low_rank_rope_FFG_blocks_muon": {
        **{**ROPE, **SCALAR, **MUON},
        **{"model.name": "NRGPT_H_FFG", "model.num_distinct_layers": 2},
    },
}
RATES = {"adamw": (5e-4, 1e-3, 2e-3, 4e-3), "muon": (2e-3, 5e-3, 1e-2, 2e-2)}
LARGE = {"GPT_Rec_parallel_muon": (2e-3, 5e-3), "low_rank_rope_FFG_muon": (1e-3, 2e-3)}


def get_config(variant: str = "small_full"):
    config = default_config()
    config.experiment = "quality"
    name, _, rate = variant.partition("@")
    apply_variant(config, name, {n: partial(change, name=n) for n in variants()})
    config.optimizer.learning_rate = float(rate or rates(name)[1])
    config.optimizer.final_learning_rate = 0.1 * config.optimizer.learning_rate
    return config


def variants():
    """Return the names of all variants, without a learning rate."""
    return [f"small_{way}" for way in WAYS] + [f"large_{way}" for way in LARGE]


def rates(name):
    """Return the learning rates to search for a variant."""
    size, _, way = name.partition("_")
    return LARGE[way] if size == "large" else RATES["muon" if way.endswith("_muon") else "adamw"]


def change(config, name):
    size, _, way = name.partition("_")
    {"small": small, "large": large}[size](config)
    reference = config.model.copy_and_resolve_references()
    reference.update({"name": "GPT_Rec_parallel", "vocab_size": 65})
    config.update_from_flattened_dict(WAYS[way])
    if config.model.name == "GPT":
        config.model.embed_dim //= 2
    config.model.mlp_ratio = fitting_ratio(config.model, parameters(reference))


def small(config):
    config.train_steps = 2000
    config.data.name = "shakespeare"
    config.data.batch_size = 12
    config.model.context_length = 64
    config.model.embed_dim = 128
    config.model.num_heads = 4
    config.model.num_steps = 4
    config.model.scan_unroll = 4
    config.eval_every = 500
    config.eval_windows = 1742  # of 1,743 in the validation split
    config.checkpoint_every = config.train_steps


def large(config):
    small(config)
    config.train_steps = config.checkpoint_every = 1000
    config.model.embed_dim = 192


def parameters(model):
    """Return the parameter count of a model with Shakespeare's 65 characters as vocabulary."""
    model = model.copy_and_resolve_references()
    model.vocab_size = 65
    return num_parameters(create_model(model))


def fitting_ratio(model, count):
    """Return the `mlp_ratio` that gives a model nearly `count` parameters (linear in the ratio)."""
    model, width = model.copy_and_resolve_references(), model.embed_dim

    def of(hidden):
        model.mlp_ratio = hidden / width
        return parameters(model)

    slope = of(2) - of(1)
    return max(1, 1 + round((count - of(1)) / slope)) / width
