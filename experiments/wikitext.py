"""WikiText with the GPT-2 tokenizer.

    make train EXP=wikitext                                             # WikiText-2
    make train EXP=wikitext:103 WORKDIR=runs/wikitext-103
    make train EXP=wikitext:small ARGS="--config.data.path=folder"      # two CPU cores

The corpus is read from Hugging Face (Salesforce/wikitext, raw) or from the folder
`--config.data.path`, with files train*, valid* and test*; see docs/data.md. This repository has not
made a full run; the sizes of (none) and 103 are our choice, not the paper's.

Variants (`--config=experiments/wikitext.py:NAME`):
    (none)  WikiText-2: NRGPT_H_FF2W, 6 steps, D=256
    103     WikiText-103: 12 steps, D=768, windows of 1024 tokens
    small   a short run of a small model on two CPU cores

Sweep: the models of experiments/shakespeare_scaling.py with the settings of `small`, two learning
rates (docs/results/paper.md).

    make sweep SWEEP=wikitext ARGS="--config.data.path=folder"

Scales (`get_sweep`):
    (none)  500 steps, one seed: two CPU cores
    gpu     1,000 steps, three seeds: one GPU, `--side_by_side`
"""

from experiments import openwebtext
from experiments._grid import Grid, runs
from experiments.shakespeare_scaling import MODELS
from nrgpt_jax.configs import apply_variant, default_config

GRIDS = {"": Grid((64,), (1e-3, 3e-3), seeds=1), "gpu": Grid((64,), (1e-3, 3e-3), seeds=3)}
WIKITEXT_103 = "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1"


def get_config(variant: str = ""):
    config = default_config()
    config.experiment = "wikitext"
    config.data.name = "wikitext"
    config.data.tokenizer = "gpt2"
    return apply_variant(config, variant, {"": two, "103": hundred_three, "small": small})


def two(config):
    config.train_steps = 5000
    config.data.batch_size = 32
    config.model.vocab_size = 50304
    config.model.context_length = 256
    config.model.embed_dim = 256
    config.model.num_heads = 4
    config.model.num_steps = 6
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.final_learning_rate = 5e-5


def hundred_three(config):
    openwebtext.paper(config)
    config.train_steps = 20_000
    config.data.path = WIKITEXT_103
    config.data.batch_size = 128


def small(config):
    """Windows of 64 tokens, D=64: minutes on two CPU cores."""
    openwebtext.small(config)


def get_sweep(scale: str = ""):
    """Return the runs `MODEL_WIDTH@LEARNING_RATE/SEED`."""
    return runs("wikitext", scale, GRIDS, MODELS, _config)


def _config(scale, model, width, rate):
    config = get_config("small")
    config.train_steps = config.checkpoint_every = 1000 if scale == "gpu" else 500
    config.eval_every = config.train_steps // 4
    config.update_from_flattened_dict(MODELS[model])
    config.model.embed_dim = width
    config.optimizer.learning_rate = rate
    config.optimizer.final_learning_rate = 0.1 * rate
    return config
