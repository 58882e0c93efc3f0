"""Models that may go on: small ones, trained at many depths, with and without a guarantee.

    make train EXP=rest:full WORKDIR=runs/rest/full/0
    make rest         # all of them, then the table (docs/rest.md)

ListOps modulo 5, D=32, 2 heads, 5 steps, 2,000 training steps of 32 x 64 tokens, Muon: a short
training, to compare ways with each other.

Variants (`--config=experiments/rest.py:NAME`): the names in `WAYS`.
"""

from functools import partial

from nrgpt_jax.configs import apply_variant, default_config

INJECTION = {"model.energies": ("injection",)}
PROJECTED = {**INJECTION, "model.rule": "projected", "model.rate": "psd"}
SPHERE = {**INJECTION, "model.rule": "sphere", "model.rate": "psd"}
TO_20 = {  # drawn from T to 4T, growing until the end
    "depth.distribution": "uniform",
    "depth.least": 5,
    "depth.most": 20,
    "depth.growth_steps": 2000,
    "depth.gradient_steps": 8,
}
HELD = {"depth.held": 2}

WAYS = {
    "full": {},
    "full_held": HELD,
    "injection_to_20": {**INJECTION, **TO_20},
    "projected": PROJECTED,
    "sphere": SPHERE,
}


def get_config(variant: str = "full"):
    config = default_config()
    config.experiment = "rest"
    return apply_variant(config, variant, variants())


def variants():
    """The changes of every variant, by its name."""
    return {name: partial(listops, way=way) for name, way in WAYS.items()}


def listops(config, way):
    config.train_steps = 2000
    config.eval_every = 1000
    config.checkpoint_every = 1000
    config.data.name = "listops"
    config.data.listops.modulus = 5
    config.data.listops.learn_questions = False
    config.data.batch_size = 32
    config.model.mask = "strict"
    config.model.context_length = 64
    config.model.embed_dim = 32
    config.model.num_heads = 2
    config.model.num_steps = 5
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.final_learning_rate = 1e-4
    config.update_from_flattened_dict(way)
