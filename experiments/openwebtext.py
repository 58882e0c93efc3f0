"""OpenWebText with the GPT-2 tokenizer: the paper's comparison with GPT.

    make train EXP=openwebtext                                           # NRGPT_H_FF2W
    make train EXP=openwebtext:GPT_Rec_parallel WORKDIR=runs/parallel
    make train EXP=openwebtext:small ARGS="--config.data.path=folder"    # two CPU cores

The corpus is read from Hugging Face (Skylion007/openwebtext) or from `--config.data.path`, and
prepared once; see docs/data.md. A batch of 384 windows is accumulated in 4 parts, which 1, 8 or 32
devices can share. A v5e-8 has memory for 4 windows per chip at once
(--config.optimizer.accumulation_steps=12), and 256 devices share 384 windows with
--config.mesh.tensor=2 --config.optimizer.accumulation_steps=1. The paper gives validation losses
(mean, standard deviation) of 2.921 +- 0.005 for GPT, 3.454 +- 0.037 for GPT_Rec_parallel and 3.467
+- 0.073 for NRGPT_H_FF2W. This repository has not made a full run.

Variants (`--config=experiments/openwebtext.py:NAME`):
    (none)            NRGPT_H_FF2W as released: 12 steps, D=768, 12 heads
    GPT               the baseline of 12 layers; its head tied, as in the paper's 124M parameters
    GPT_Rec_parallel  the recurrent baseline
    large             NRGPT_H_FF2W with D=1536, 6 steps, learning rate 3e-5
    small             a short run of a small model on two CPU cores
"""

from nrgpt_jax.configs import apply_variant, default_config


def get_config(variant: str = ""):
    config = default_config()
    config.experiment = "openwebtext"
    config.data.name = "openwebtext"
    paper(config)
    variants = {
        "": lambda c: None,
        "GPT": lambda c: c.model.update({"name": "GPT", "tied_head": True}),
        "GPT_Rec_parallel": lambda c: c.model.update({"name": "GPT_Rec_parallel"}),
        "large": large,
        "small": small,
    }
    return apply_variant(config, variant, variants)


def paper(config):
    """12 x 32 windows of 1024 tokens per step, 100,000 steps, AdamW, cosine decay from 1e-4."""
    config.train_steps = 100_000
    config.log_every = 100
    config.eval_every = 1000
    config.eval_windows = 12 * 200
    config.checkpoint_every = 1000
    config.data.tokenizer = "gpt2"
    config.data.validation_fraction = 0.0005
    config.data.batch_size = 12 * 32
    config.model.vocab_size = 50304  # 50257, padded to a multiple of 64
    config.model.context_length = 1024
    config.model.embed_dim = 768
    config.model.num_heads = 12
    config.model.num_steps = 12
    config.model.mask = "inclusive"
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.final_learning_rate = 5e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.accumulation_steps = 4


def large(config):
    config.model.embed_dim = 1536
    config.model.num_steps = 6
    config.optimizer.learning_rate = 3e-5
    config.optimizer.final_learning_rate = 1.5e-5


def small(config):
    """Windows of 64 tokens, D=64: minutes on two CPU cores."""
    config.train_steps = 500
    config.log_every = 20
    config.eval_every = 100
    config.eval_windows = 64
    config.checkpoint_every = 250
    config.data.validation_fraction = 0.05
    config.data.batch_size = 8
    config.model.vocab_size = 0
    config.model.context_length = 64
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_steps = 4
    config.model.scan_unroll = 4
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-4
    config.optimizer.warmup_steps = 50
    config.optimizer.accumulation_steps = 1
