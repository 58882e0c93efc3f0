"""Models for inference beyond the trained depth, with and without guaranteed descent.

    make train EXP=rest:listops_full WORKDIR=runs/rest/listops_full/0
    make rest         # all of them, then the tables (docs/results/rest.md)

ListOps is configured as in `make train EXP=listops` (modulo 10, D=64, 4 heads, T=5, 5,000 training
steps). Shakespeare is configured as in `make train EXP=shakespeare`, but with the strict mask and
2,000 training steps (D=128, 4 heads, T=6). Variants in _long have twice the training steps, those
in _short three tenths. `sphere_decay_settled` starts from the model of `sphere_decay_held`,
`sphere_decay_decoded` (four fifths of the steps) from that of `sphere_decay_settled`, and
`sphere_decay_decoded_on` (a fifth) from that of `sphere_decay_decoded`.

Variants (`--config=experiments/rest.py:TASK_WAY`):
    TASK  listops, shakespeare
    WAY   one of `WAYS` in experiments/_ways.py
"""

from functools import partial

import experiments.listops
import experiments.shakespeare
from experiments._grid import all_variants
from experiments._ways import WAYS, apply_way
from nrgpt_jax.configs import apply_variant, default_config


def get_config(variant: str = "listops_full"):
    config = default_config()
    config.experiment = "rest"
    return apply_variant(config, variant, variants())


def get_sweep(scale: str = ""):
    """Return all variants with three seeds."""
    return all_variants("rest", scale, get_config, variants())


def variants():
    """Return the configuration changes of every variant, by name."""
    tasks = {"listops": listops, "shakespeare": shakespeare}
    return {
        f"{task}_{way}": partial(change, task=base, way=WAYS[way])
        for task, base in tasks.items()
        for way in WAYS
    }


def change(config, task, way):
    task(config)
    config.eval_prompts = 0  # the study measures answers
    apply_way(config, way)
    config.eval_every = config.checkpoint_every = config.train_steps // 4


def listops(config):
    config.data.name = "listops"
    config.model.mask = "strict"
    experiments.listops.laptop(config)
    config.optimizer.accumulation_steps = 1


def shakespeare(config):
    config.data.name = "shakespeare"
    config.model.mask = "strict"
    experiments.shakespeare.laptop(config)
    config.train_steps = 2000
    config.optimizer.accumulation_steps = 1
