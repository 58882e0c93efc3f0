"""C4 in English, with the GPT-2 tokenizer.

    make train EXP=c4
    make train EXP=c4:small ARGS="--config.data.path=folder"    # two CPU cores

The corpus is read from Hugging Face (allenai/c4, en: 305 GB of JSON lines) or from
`--config.data.path`, such as gs://BUCKET/c4/en; its own validation split is used. See docs/data.md.
The settings are those of openwebtext: the paper has none for C4. This repository has not made a
full run.

Variants (`--config=experiments/c4.py:NAME`):
    (none)            NRGPT_H_FF2W, 12 steps, D=768, 12 heads
    GPT               the baseline of 12 layers
    GPT_Rec_parallel  the recurrent baseline
    large             NRGPT_H_FF2W with D=1536, 6 steps, learning rate 3e-5
    small             a short run of a small model on two CPU cores
"""

from experiments import openwebtext


def get_config(variant: str = ""):
    config = openwebtext.get_config(variant)
    config.experiment = "c4"
    config.data.name = "c4"
    return config
