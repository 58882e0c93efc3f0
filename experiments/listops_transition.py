"""From what number of parameters on does a model solve ListOps? The paper's Figure 3.

    make sweep SWEEP=listops_transition
    make sweep SWEEP=listops_transition:paper LAUNCHER=slurm

Three models, widths on a logarithmic scale, one head, 5 steps, strict mask.

Scales (`get_sweep`):
    (none)  modulo 5, five widths from 12 to 48, one seed: two CPU cores
    gpu     modulo 10, five widths from 12 to 48, three seeds, two learning rates: one GPU,
            `--side_by_side`
    paper   modulo 10, sixteen widths from 8 to 256, as released: batch 64 x 128, AdamW, 100,000
            steps

Variants (`--config=experiments/listops_transition.py:MODEL_WIDTH`, the scale (none)):
    MODEL  GPT_Rec_parallel, NRGPT_H_FF1, NRGPT_H_FF2W
    WIDTH  8 ... 256
"""

import experiments.listops
from nrgpt_jax.configs import default_config, with_seeds
from nrgpt_jax.errors import UserError

MODELS = ("GPT_Rec_parallel", "NRGPT_H_FF1", "NRGPT_H_FF2W")
WIDTHS = {
    "": (12, 16, 24, 32, 48),
    "gpu": (12, 16, 24, 32, 48),
    "paper": tuple(round(8 * 32 ** (i / 15)) for i in range(16)),
}
RATES = {"": (1e-2,), "gpu": (3e-3, 1e-2), "paper": (5e-4,)}
SEEDS = {"": 1, "gpu": 3, "paper": 1}


def get_config(variant: str = "NRGPT_H_FF2W_32"):
    model, _, width = variant.rpartition("_")
    if model not in MODELS or not width.isdecimal():
        raise UserError(f"{variant!r} is no variant of listops_transition: MODEL_WIDTH")
    return _config("", model, int(width), RATES[""][0])


def get_sweep(scale: str = ""):
    """The runs `MODEL_WIDTH@LEARNING_RATE/SEED`."""
    if scale not in WIDTHS:
        known = ", ".join(filter(None, WIDTHS))
        raise UserError(f"listops_transition has no scale {scale!r}; it has {known}")
    cells = {
        f"{model}_{width}@{rate:g}": _config(scale, model, width, rate)
        for width in WIDTHS[scale]
        for model in MODELS
        for rate in RATES[scale]
    }
    return with_seeds(cells, SEEDS[scale])


def _config(scale, model, width, rate):
    config = default_config()
    config.experiment = "listops_transition"
    config.data.name = "listops"
    config.model.mask = "strict"
    if scale == "paper":
        experiments.listops.paper(config)
    else:
        experiments.listops.laptop(config)
        config.train_steps = 4000
        config.optimizer.accumulation_steps = 1
        config.data.listops.modulus = 10 if scale == "gpu" else 5
        config.eval_every = config.checkpoint_every = 1000
        config.eval_prompts = 0  # answers are asked for when all are trained
    config.model.name = model
    config.model.num_heads = 1
    config.model.embed_dim = width
    final = config.optimizer.final_learning_rate / config.optimizer.learning_rate
    config.optimizer.learning_rate = rate
    config.optimizer.final_learning_rate = final * rate
    return config
