"""Every mistake in a configuration is one line that names field, value and what is allowed."""

import pytest

from nrgpt_jax.configs import default_config
from nrgpt_jax.errors import UserError
from nrgpt_jax.training.config_checks import check_config, check_mesh
from nrgpt_jax.training.config_notes import notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_steps": -3}, "train_steps=-3 "),
        ({"eval_prompts": -1}, "eval_prompts=-1 "),
        ({"model.name": "NRGPT_X"}, "model.name='NRGPT_X' .* NRGPT_H_FF2W, .* GPT"),
        (
            {"model.name": "NRGPT"},
            r"model.energies=\(\) .* a tuple of names, each once, of full_rank",
        ),
        ({"model.energies": ("leak", "leak")}, "model.energies=.* each once"),
        ({"model.energies": ("leap",)}, "model.energies=.*leap.* injection, leak"),
        ({"model.energies": ("leak",), "model.norm": "rms_norm"}, "model.norm='rms_norm' .* gain"),
        ({"model.rule": "x"}, "model.rule='x' .* descent, momentum, projected, sphere"),
        ({"model.combination": "x"}, "model.combination='x' .* sum, mixture"),
        ({"model.num_distinct_layers": 9}, "model.num_distinct_layers=9 .* at most num_steps=5"),
        ({"optimizer.name": "lyon"}, "optimizer.name='lyon' .* adamw, muon"),
        (
            {"optimizer.weight_decay_mask": "none"},
            "optimizer.weight_decay_mask='none' .* matrices, all",
        ),
        ({"model.num_steps": 0}, "model.num_steps=0"),
        ({"model.dropout": 1.0}, "model.dropout=1.0"),
        ({"model.mask": "none"}, "model.mask='none' .* strict, inclusive"),
        ({"model.inference_rate": "x"}, "model.inference_rate='x' .* full, gamma, psd"),
        ({"model.name": "GPT", "model.num_heads": 3}, "embed_dim=64 .*num_heads=3 must divide"),
        ({"model.attention": "low_rank", "model.num_heads": 3}, "num_heads=3 must divide"),
        (
            {"model.inference_rate": "gamma", "model.norm": "none"},
            "model.inference_rate='gamma' .* gain of the norm",
        ),
        ({"model.vocab_size": -1}, "model.vocab_size=-1"),
        ({"data.name": "pile"}, "data.name='pile' .* listops, .* text"),
        ({"data.batch_size": 63}, "multiple of 2 devices .* mesh.tensor=2 .*=1 does"),
        (
            {"data.batch_size": 12, "optimizer.accumulation_steps": 4},
            "data.batch_size=12 .* optimizer.accumulation_steps=3 does",
        ),
        ({"data.batch_size": 6, "optimizer.accumulation_steps": 2}, "accumulation_steps=2"),
        ({"data.validation_fraction": 0.0}, "data.validation_fraction=0.0"),
        ({"data.train_fraction": 1.5}, "data.train_fraction=1.5"),
        ({"data.tokenizer": "bpe"}, "data.tokenizer='bpe'"),
        ({"data.listops.operations": ("max", "mean")}, "operations='mean'"),
        ({"data.listops.modulus": 1}, "modulus=1"),
        ({"data.listops.max_arguments": 1}, "max_arguments=1"),
        ({"data.listops.function_probability": 1.5}, "function_probability=1.5"),
        ({"data.listops.exclusion_rate": 0.0}, "exclusion_rate=0.0"),
        ({"optimizer.schedule": "linear"}, "schedule='linear' .* cosine, exponential, constant"),
        ({"optimizer.learning_rate": 0.0}, "learning_rate=0.0"),
        ({"optimizer.beta2": 1.0}, "beta2=1.0"),
        ({"model.embed_dim": 10**12}, "model.embed_dim=1000000000000 .* at most 262,144"),
        ({"model.context_length": 10**9}, "model.context_length=1000000000 .* at most"),
        ({"model.num_steps": 10**9}, "model.num_steps=1000000000 .* at most"),
        ({"model.beta": float("inf")}, "model.beta=inf .* finite"),
        ({"model.inference_rate_init": float("nan")}, "model.inference_rate_init=nan"),
        ({"model.beta": 1e-300}, "model.beta=1e-300 "),
        ({"optimizer.weight_decay": float("inf")}, "optimizer.weight_decay=inf .* finite"),
        ({"optimizer.accumulation_steps": 10**12}, "accumulation_steps=1000000000000 .* at most"),
        ({"optimizer.accumulation_steps": 10**9}, "data.batch_size=64 .*_steps=32 does"),
        ({"train_steps": 2**31}, "train_steps=2147483648 .* at most"),
        ({"seed": 2**32}, "seed=4294967296 .* at most"),
        ({"data.batch_size": 10**12}, "data.batch_size=1000000000000 .* at most"),
        ({"data.path": "a\0b"}, "data.path=.* without the character 0"),
        ({"data.path": "s3://me:hidden@b/x"}, r"data.path=s3://me:\*\*\*@b/x holds credentials"),
        ({"experiment": "https://h/x?sig=hidden"}, r"experiment=https://h/x\?sig=\*\*\* holds"),
        ({"data.listops.modulus": 10**9}, "modulus=1000000000 .* at most"),
        ({"data.listops.max_arguments": 20}, "exclusion_rate=0.05 .* it would hold out"),
        (
            {"data.listops.depth": 60, "data.listops.function_probability": 1.0},
            "data.listops.depth=60 .* arguments",
        ),
    ],
)
def test_mistakes(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace(r"\.*", ".*")):
        check_config(config, num_devices=2)


def test_a_model_that_no_memory_holds_is_refused_before_it_is_made():
    config = default_config()
    config.model.update({"vocab_size": 2**20, "embed_dim": 2**17, "num_heads": 8})
    with pytest.raises(UserError, match=r"parameters \(one array is .*GB are free; make model"):
        check_mesh(config, num_devices=1)
    config.model.update({"vocab_size": 11, "embed_dim": 8})
    check_mesh(config, num_devices=1)


def test_defaults_are_valid_and_locked():
    config = default_config()
    check_config(config, num_devices=2)
    with pytest.raises((AttributeError, KeyError)):
        config.model.widht = 3


def test_heads_need_not_divide_the_width_of_a_full_rank_model():
    config = default_config()
    config.model.num_heads = 3
    check_config(config, num_devices=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"optimizer.warmup_steps": 999}, None),
        ({"optimizer.warmup_steps": 1000}, "optimizer.warmup_steps=1000"),
        ({"optimizer.final_learning_rate": 1e-2}, "optimizer.final_learning_rate=0.01"),
        ({"depth.curriculum_steps": 1001}, "depth.curriculum_steps=1001"),
        ({"checkpoint_every": 1001}, "checkpoint_every=1001"),
        ({"checkpoint_keep_every": 750}, "checkpoint_keep_every=750"),
        ({"checkpoint_keep_every": 1000}, None),
        ({"data.batch_size": 100}, None),
        ({"data.batch_size": 101}, "data.batch_size=101"),
        ({"model.name": "GPT", "model.inference_rate": "psd"}, "model.inference_rate='psd'"),
        ({"model.full_steps": 2}, "model.full_steps=2"),
        ({"model.full_steps": 2, "model.inference_rate_decay": 0.5}, None),
        ({"model.inference_rate_init": 0.1}, "model.inference_rate_init=0.1"),
        ({"model.inference_rate_init": 0.1, "model.inference_rate": "scalar"}, None),
        ({"model.head_dim": 4}, "model.head_dim=4"),
        ({"model.head_dim": 4, "model.attention": "low_rank"}, None),
    ],
)
def test_settings_that_do_not_do_what_they_seem_to_are_named(changes, named):
    config = default_config()
    config.update_from_flattened_dict(changes)
    found = notes(config, windows=100)
    assert [note.startswith(named or "") for note in found] == [True] * (named is not None)
