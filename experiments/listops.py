"""ListOps: nested max, median and add modulo 10, solved step by step.

    make train EXP=listops

Measured on two CPU cores: 99.5%, 99.6% and 99.6% of the 2,000 held-out prompts (greedy; seeds 0, 1
and 2), in 7 minutes. The variant demo: 96.5%, two and a half minutes.

Variants (`--config=experiments/listops.py:NAME`):
    (none)         sized for a laptop CPU
    rest           converges: guaranteed descent, with steps that decay (docs/results/rest.md)
    long           four times as many training steps, ten times as many expressions
                   (docs/results/paper.md)
    guaranteed     sized as demo, with a guarantee of descent, 6 steps and a fading tail: 92.4% of
                   500 prompts, 88.5% of 200 at 12 and at 48 steps (one seed)
    demo           modulo 5, smaller still: minutes (`make demo`)
    paper          the paper's accuracy study; one point of its sweep over the width
                   (--config.model.embed_dim=8 ... 256) and over three models
                   (--config.model.name=NRGPT_H_FF1, NRGPT_H_FF2W, GPT_Rec_parallel)
    deep_scalar    the paper's deep run: 30 steps, inference rate a positive scalar
    deep_identity  the same with the identity
"""

from experiments._ways import SPHERE, come_to_rest
from nrgpt_jax.configs import apply_variant, default_config


def get_config(variant: str = ""):
    config = default_config()
    config.experiment = "listops"
    config.data.name = "listops"
    config.model.mask = "strict"
    variants = {
        "": laptop,
        "rest": rest,
        "long": long,
        "demo": demo,
        "guaranteed": guaranteed,
        "paper": paper,
        "deep_scalar": lambda c: deep(c, "scalar"),
        "deep_identity": lambda c: deep(c, "identity"),
    }
    return apply_variant(config, variant, variants)


def laptop(config):
    config.train_steps = 5000
    config.eval_every = 500
    config.checkpoint_every = 500
    config.data.batch_size = 32
    config.model.scan_unroll = 5
    config.model.context_length = 64
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.data.listops.learn_questions = False
    config.optimizer.accumulation_steps = 2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 1e-4


def rest(config):
    """States on a sphere, a `psd` rate, five steps, and five more at a decaying rate."""
    laptop(config)
    come_to_rest(config)


def long(config):
    """20,000 steps on 500,000 expressions, for answers sampled at temperature 1."""
    laptop(config)
    config.train_steps = 20_000
    config.data.listops.num_train = 500_000
    config.eval_every = config.checkpoint_every = 1000


def demo(config):
    """Numbers modulo 5, with half the width and half the heads."""
    laptop(config)
    config.train_steps = 6000
    config.eval_every = 1000
    config.data.listops.modulus = 5
    config.model.embed_dim = 32
    config.model.num_heads = 2
    config.optimizer.learning_rate = 1e-2


def guaranteed(config):
    """The demo with states on a sphere and a `psd` rate; steps from the sixth on fade."""
    demo(config)
    config.update_from_flattened_dict(SPHERE)
    config.train_steps = 5000
    config.model.num_steps = 6
    config.model.scan_unroll = 6
    config.model.full_steps = 5
    config.model.inference_rate_decay = 0.25


def paper(config):
    """Batch 64 x 128, AdamW 5e-4 decaying exponentially to 2e-5 over 100,000 steps, clip 1.

    Weight decay applies to all parameters, as in the release.
    """
    config.train_steps = 100_000
    config.model.context_length = 128
    config.model.embed_dim = 32
    config.optimizer.learning_rate = 5e-4
    config.optimizer.final_learning_rate = 2e-5
    config.optimizer.schedule = "exponential"
    config.optimizer.warmup_steps = 0
    config.optimizer.beta2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.weight_decay_mask = "all"


def deep(config, rate):
    """FF2W, D=64, one head, 30 steps, with a rate that guarantees descent."""
    paper(config)
    config.model.embed_dim = 64
    config.model.num_steps = 30
    config.model.inference_rate = rate
    config.optimizer.learning_rate = 4e-4
    config.optimizer.final_learning_rate = 1e-5
