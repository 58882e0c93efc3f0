"""Does NRGPT overfit less? Trainings on 1/16 to all of tiny Shakespeare.

    make sweep SWEEP=overfitting ARGS="--side_by_side"      # on one GPU

Three models of experiments/quality.py with equal parameters (223 thousand), equal steps (4,000 of
12 x 64 characters: 49 epochs of a sixteenth, 3 of the whole), their best learning rates there,
three seeds and no dropout, on the first 1/16, 1/8, 1/4, 1/2 and all of the training split. The
validation split is the same for all.

Variants (`--config=experiments/overfitting.py:MODEL_PARTS`):
    MODEL  GPT, GPT_Rec_parallel, NRGPT_H_FF2W
    PARTS  1, 2, 4, 8, 16: the training split is its first of PARTS parts
"""

import experiments.quality
from experiments._grid import all_variants
from nrgpt_jax.errors import UserError

MODELS = {  # in experiments/quality.py
    "GPT": "small_GPT_muon@0.005",
    "GPT_Rec_parallel": "small_GPT_Rec_parallel_muon@0.005",
    "NRGPT_H_FF2W": "small_full_muon@0.002",
}
PARTS = (1, 2, 4, 8, 16)


def get_config(variant: str = "NRGPT_H_FF2W_16"):
    model, _, parts = variant.rpartition("_")
    if model not in MODELS or parts not in map(str, PARTS):
        raise UserError(f"{variant!r} is no variant of overfitting: MODEL_PARTS")
    config = experiments.quality.get_config(MODELS[model])
    config.experiment = "overfitting"
    config.data.train_fraction = 1 / int(parts)
    config.train_steps = config.checkpoint_every = 4000
    config.eval_every = 250
    config.eval_windows = 256
    return config


def get_sweep(scale: str = ""):
    """Return the runs `MODEL_PARTS/SEED`."""
    names = [f"{model}_{parts}" for model in MODELS for parts in PARTS]
    return all_variants("overfitting", scale, get_config, names)
