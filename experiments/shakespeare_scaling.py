"""Shakespeare by characters at three sizes: the paper's Figure 4.

    make sweep SWEEP=shakespeare_scaling ARGS="--side_by_side"      # on one GPU

Four models at three widths, three seeds each: T=6, 4 heads, batches of 32 x 128 characters, Muon,
2,000 training steps, no dropout. The learning rate of each model is the better of two.
FFG_rope is NRGPT_H_FFG with low-rank scores and rotary positions; the others are the paper's.

Scales (`get_sweep`):
    (none)  D=32, 64, 128
    paper   D=32 ... 768, as released: batch 64 x 256, AdamW, dropout 0.1, 40,000 steps, the grid of
            heads, steps and learning rates one by one (experiments/shakespeare.py:paper)

Variants (`--config=experiments/shakespeare_scaling.py:MODEL_WIDTH`):
    MODEL  GPT, GPT_Rec_parallel, NRGPT_H_FF2W, FFG_rope
"""

import experiments.shakespeare
from experiments._grid import Grid, point, runs
from nrgpt_jax.configs import default_config

NAME = "shakespeare_scaling"
MODELS = {
    "GPT": {"model.name": "GPT"},
    "GPT_Rec_parallel": {"model.name": "GPT_Rec_parallel"},
    "NRGPT_H_FF2W": {"model.name": "NRGPT_H_FF2W", "model.attention": "full_rank"},
    "FFG_rope": {"model.name": "NRGPT_H_FFG", "model.attention": "low_rank_rope"},
}
GRIDS = {
    "": Grid((32, 64, 128), (2e-3, 5e-3), seeds=3),
    "paper": Grid((32, 64, 128, 256, 384, 512, 768), (1e-3, 1e-4), seeds=1),
}


def get_config(variant: str = "NRGPT_H_FF2W_128"):
    model, width = point(NAME, variant, MODELS)
    return _config("", model, width, GRIDS[""].rates[0])


def get_sweep(scale: str = ""):
    """Return the runs `MODEL_WIDTH@LEARNING_RATE/SEED`."""
    return runs(NAME, scale, GRIDS, MODELS, _config)


def _config(scale, model, width, rate):
    config = default_config()
    config.experiment = NAME
    config.data.name = "shakespeare"
    config.model.mask = "inclusive"
    if scale == "paper":
        experiments.shakespeare.paper(config)
    else:
        experiments.shakespeare.laptop(config)
        config.train_steps = config.checkpoint_every = 2000
        config.eval_every = 250
        config.data.batch_size = 32
        config.optimizer.accumulation_steps = 1
    config.update_from_flattened_dict(MODELS[model])
    config.model.embed_dim = width
    config.optimizer.learning_rate = rate
    config.optimizer.final_learning_rate = 0.1 * rate
    return config
