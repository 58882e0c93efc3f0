"""Tasks whose harder inputs may need more steps: shallow training, deep inference.

    make train EXP=reasoning:parity_sphere

Addition of up to 10 digits (prompts of 10, 15 and 20), parity of up to 16 bits (16, 24, 32), and up
to 3 hops of induction (3, 4, 5). ListOps is up to two operations deep, with the loss of the answer
alone. D=64, 4 heads, T=5 with depths drawn from 5 to 10, 4,000 Muon steps of 32 x 80 tokens.

Variants (`--config=experiments/reasoning.py:TASK_MODEL`):
    TASK   addition, parity, hops, listops
    MODEL  full: FFG_exact with an unconstrained rate; sphere: the same with guaranteed descent;
           recurrent: GPT_Rec_parallel with nearly as many parameters
"""

from functools import partial
from itertools import product

from experiments._ways import SPHERE
from nrgpt_jax.configs import apply_variant, default_config

TASKS = {
    "addition": {"trained": 10, "tested": (10, 15, 20)},
    "parity": {"trained": 16, "tested": (16, 24, 32)},
    "hops": {"trained": 3, "tested": (3, 4, 5)},
    "listops": {},
}
NRGPT = {"model.name": "NRGPT_H_FFG_exact", "model.attention": "low_rank_rope"}
MODELS = {
    "full": NRGPT,
    "sphere": {**NRGPT, **SPHERE},
    "recurrent": {"model.name": "GPT_Rec_parallel"},
}


def get_config(variant: str = "parity_sphere"):
    config = default_config()
    config.experiment = "reasoning"
    changes = {"_".join(names): partial(change, *names) for names in product(TASKS, MODELS)}
    return apply_variant(config, variant, changes)


def change(task, model, config):
    config.data.name = task
    config.data.options.update(TASKS[task])
    config.data.batch_size = 32
    config.data.listops.learn_questions = False
    config.train_steps = 4000
    config.eval_every = config.checkpoint_every = 1000
    config.model.mask = "strict"
    config.model.context_length = 80
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_steps = 5
    config.depth.distribution = "uniform"
    config.depth.min_steps, config.depth.max_steps = 5, 10
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 1e-4
    config.update_from_flattened_dict(MODELS[model])
