"""Models that may go on: trained at many depths, with and without a guarantee.

    make train EXP=rest:listops_full WORKDIR=runs/rest/listops_full/0
    make rest         # all of them, then the tables (docs/rest.md)

ListOps as `make train EXP=listops` has it (modulo 10, D=64, 4 heads, T=5, 5,000 training steps),
and Shakespeare as `make train EXP=shakespeare` has it, but with the strict mask and 2,000 training
steps (D=128, 4 heads, T=6). A name that ends in _long has twice the training steps, one in _short
three tenths of them; `sphere_decay_settled` begins with the model of `sphere_decay_held` beside it,
`sphere_decay_decoded`, of four fifths as many steps, with that of `sphere_decay_settled`, and
`sphere_decay_decoded_on`, of a fifth of them, with that of `sphere_decay_decoded`.

Variants (`--config=experiments/rest.py:TASK_WAY`):
    TASK  listops, shakespeare
    WAY   of `WAYS`
"""

from functools import partial

import experiments.listops
import experiments.shakespeare
from experiments._grid import all_variants
from nrgpt_jax.configs import apply_variant, default_config

INJECTION = {"model.energies": ("injection",)}
PROJECTED = {**INJECTION, "model.rule": "projected", "model.rate": "psd"}
SPHERE = {**INJECTION, "model.rule": "sphere", "model.rate": "psd"}


def to(times, distribution):
    """Depths from T to so many times T, a bound that grows until the end."""
    return lambda config: {
        "depth.distribution": distribution,
        "depth.least": config.model.num_steps,
        "depth.most": times * config.model.num_steps,
        "depth.growth_steps": config.train_steps,
        "depth.gradient_steps": 8,
    }


def held(descents):
    return lambda config: {"depth.held": descents}


def settle(config):
    """On from the model of `sphere_decay_held`, until further held descents change nothing."""
    further = {"depth.held_before": 4, "depth.consistency": 2.0}
    return {**on_from(config, "sphere_decay_held", 1.5e-3, 7.5e-5), **further}


def decode(config):
    """On from the model of `sphere_decay_settled`, with the loss of tokens that are decoded."""
    steps = 4 * config.train_steps // 5
    return {**on_from(config, "sphere_decay_settled", 1e-3, 5e-5), **decoded(steps)}


def decode_on(config):
    """On from the model of `sphere_decay_decoded`, in the same way."""
    steps = config.train_steps // 5
    return {**on_from(config, "sphere_decay_decoded", 5e-4, 2.5e-5), **decoded(steps)}


def decoded(steps):
    """The settings of both: `scan_unroll` 1 is faster on a CPU, and takes less time to compile."""
    return {"depth.decoded": True, "train_steps": steps, "model.scan_unroll": 1}


def on_from(config, way, learning_rate, final_learning_rate):
    """With the model of another way of the same task and seed, and a new optimizer."""
    return {
        "init_from": f"{{workdir}}/../../{config.data.name}_{way}/{{seed}}",
        "optimizer.learning_rate": learning_rate,
        "optimizer.final_learning_rate": final_learning_rate,
        "optimizer.warmup_steps": 50,
    }


def penalty(config):
    return {"depth.penalty": 1.0}


def decay(config):
    """T steps as before, and as many whose rate halves each time."""
    steps = config.model.num_steps
    return {"model.num_steps": 2 * steps, "model.full_steps": steps, "model.rate_decay": 0.5}


def come_to_rest(config):
    """The way `sphere_decay`."""
    config.model.mask = "strict"
    go(config, WAYS["sphere_decay"])


def go(config, way):
    for changes in way:
        config.update_from_flattened_dict(changes(config) if callable(changes) else changes)


def long(config):
    return {"train_steps": 2 * config.train_steps}


def short(config):
    return {"train_steps": 3 * config.train_steps // 10}


NEAR = to(4, "uniform")
FAR = to(20, "log_uniform")
WAYS = {
    "full": (),
    "full_long": (long,),
    "full_decay": (decay,),
    "full_held": (held(2),),
    "sphere": (SPHERE,),
    "sphere_decay": (SPHERE, decay),
    "sphere_decay_held": (SPHERE, decay, held(1)),
    "sphere_decay_settled": (SPHERE, decay, held(1), settle),
    "sphere_decay_settled_short": (SPHERE, decay, held(1), settle, short),
    "sphere_decay_decoded": (SPHERE, decay, decode),
    "sphere_decay_decoded_on": (SPHERE, decay, decode_on),
    "sphere_decay_held_2": (SPHERE, decay, held(2)),
    "injection_near_long": (INJECTION, long, NEAR),
    "injection_far_long": (INJECTION, long, FAR),
    "projected_near_long": (PROJECTED, long, NEAR),
    "sphere_near_long": (SPHERE, long, NEAR),
    "sphere_far_long": (SPHERE, long, FAR),
    "sphere_far_penalty_long": (SPHERE, long, FAR, penalty),
}


def get_config(variant: str = "listops_full"):
    config = default_config()
    config.experiment = "rest"
    return apply_variant(config, variant, variants())


def get_sweep(scale: str = ""):
    """All variants with three seeds."""
    return all_variants("rest", scale, get_config, variants())


def variants():
    """The changes of every variant, by its name."""
    tasks = {"listops": listops, "shakespeare": shakespeare}
    return {
        f"{task}_{way}": partial(change, task=base, way=WAYS[way])
        for task, base in tasks.items()
        for way in WAYS
    }


def change(config, task, way):
    task(config)
    config.eval_prompts = 0  # answers are asked for by the study
    go(config, way)
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
