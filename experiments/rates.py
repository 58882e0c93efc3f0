"""The cost of a descent guarantee: one small model per inference rate.

    make train EXP=rates:listops_gamma WORKDIR=runs/rates/listops_gamma/0 ARGS="--config.seed=0"
    make rates        # all of them with three seeds, then the table (docs/results/rates.md)

On one core of a busy CPU: 4 to 6 minutes (listops), 7 to 8 (shakespeare), 9 to 22 (deep). The
results are in docs/results/rates.md.

Variants (`--config=experiments/rates.py:TASK_RATE`):
    TASK  listops      modulo 5, D=32, 2 heads, 5 steps
          shakespeare  characters, D=64, 2 heads, 6 steps
          deep         listops with D=64, 1 head and 30 steps, as in the paper's deep run
    RATE  full, gamma, psd, scalar, identity (deep: scalar, identity)

Each rate has the norm that its proposition requires, and all have the strict mask.
"""

from functools import partial

from experiments._grid import all_variants
from nrgpt_jax.configs import apply_variant, default_config

NORMS = {  # by rate
    "full": "bare_layer_norm",
    "gamma": "layer_norm",
    "psd": "none",
    "scalar": "bare_layer_norm",
    "identity": "bare_layer_norm",
}


def get_config(variant: str = "listops_gamma"):
    config = default_config()
    config.experiment = "rates"
    return apply_variant(config, variant, variants())


def get_sweep(scale: str = ""):
    """Return all variants with three seeds."""
    return all_variants("rates", scale, get_config, variants())


def variants():
    """Return the configuration changes of every variant, by name."""
    tasks = {"listops": listops, "shakespeare": shakespeare, "deep": deep}
    return {
        f"{task}_{rate}": partial(changes, rate=rate)
        for task, changes in tasks.items()
        for rate in NORMS
        if task != "deep" or rate in ("scalar", "identity")
    }


def listops(config, rate):
    _common(config, rate, learning_rate=5e-3)
    config.data.name = "listops"
    config.data.listops.modulus = 5
    config.data.listops.learn_questions = False
    config.data.batch_size = 32
    config.train_steps = 5000
    config.model.embed_dim = 32
    config.model.num_heads = 2
    config.model.num_steps = 5


def shakespeare(config, rate):
    _common(config, rate, learning_rate=2e-3)
    config.data.name = "shakespeare"
    config.data.batch_size = 16
    config.train_steps = 3500
    config.model.embed_dim = 64
    config.model.num_heads = 2
    config.model.num_steps = 6


def deep(config, rate):
    listops(config, rate)
    config.data.batch_size = 8
    config.train_steps = 2000
    config.model.embed_dim = 64
    config.model.num_heads = 1
    config.model.num_steps = 30
    config.optimizer.learning_rate = 2e-3
    config.optimizer.final_learning_rate = 2e-4


def _common(config, rate, learning_rate):
    config.eval_every = 1000
    config.checkpoint_every = 1000
    config.model.mask = "strict"
    config.model.inference_rate = rate
    config.model.norm = NORMS[rate]
    config.model.context_length = 64
    config.model.scan_unroll = 6
    config.optimizer.accumulation_steps = 1
    config.optimizer.learning_rate = learning_rate
    config.optimizer.final_learning_rate = 0.1 * learning_rate
