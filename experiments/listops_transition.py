"""ListOps accuracy against the number of parameters: the paper's Figure 3.

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
from experiments._grid import Grid, point, runs
from nrgpt_jax.configs import default_config

NAME = "listops_transition"
MODELS = ("GPT_Rec_parallel", "NRGPT_H_FF1", "NRGPT_H_FF2W")
GRIDS = {
    "": Grid((12, 16, 24, 32, 48), (1e-2,), seeds=1),
    "gpu": Grid((12, 16, 24, 32, 48), (3e-3, 1e-2), seeds=3),
    "paper": Grid(tuple(round(8 * 32 ** (i / 15)) for i in range(16)), (5e-4,), seeds=1),
}


def get_config(variant: str = "NRGPT_H_FF2W_32"):
    model, width = point(NAME, variant, MODELS)
    return _config("", model, width, GRIDS[""].rates[0])


def get_sweep(scale: str = ""):
    """Return the runs `MODEL_WIDTH@LEARNING_RATE/SEED`."""
    return runs(NAME, scale, GRIDS, MODELS, _config)


def _config(scale, model, width, rate):
    config = default_config()
    config.experiment = NAME
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
        config.eval_prompts = 0  # the study measures answers after all trainings
    config.model.name = model
    config.model.num_heads = 1
    config.model.embed_dim = width
    final = config.optimizer.final_learning_rate / config.optimizer.learning_rate
    config.optimizer.learning_rate = rate
    config.optimizer.final_learning_rate = final * rate
    return config
