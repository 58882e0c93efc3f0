"""A run that was stopped and gone on with ends as one that was left alone, in every mode."""

import pytest
from train_helpers import config_in, stop_at

from nrgpt_jax.training import loop
from studies.reliability import judge

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.slow]

MODES = {
    "muon, in parts, of two blocks": {
        "model.num_distinct_layers": 2,
        "optimizer.name": "muon",
        "optimizer.accumulation_steps": 2,
    },
    "momentum, sizes of steps": {"model.rule": "momentum", "model.per_step_scale": True},
    "projected psd": {"model.rule": "projected", "model.inference_rate": "psd"},
    "mixture of RoPE, injection and leak": {
        "model.attention": "low_rank_rope",
        "model.energies": ("injection", "leak"),
        "model.combination": "mixture",
    },
    "many depths, on the sphere": {
        "model.rule": "sphere",
        "model.inference_rate": "psd",
        "depth.distribution": "uniform",
        "depth.sample_per": "sequence",
        "depth.curriculum_steps": 8,
        "depth.backprop_steps": 2,
        "depth.penalty": 0.1,
        "model.mask": "strict",
    },
    "held descents": {
        "depth.refine_passes": 1,
        "depth.max_burn_in_passes": 2,
        "depth.consistency": 1.0,
        "model.mask": "strict",
    },
    "fsdp": {"mesh.fsdp": 2, "mesh.data": 1},
    "bfloat16, computed again": {"model.dtype": "bfloat16", "model.remat": "step"},
    "GPT": {"model.name": "GPT", "optimizer.schedule": "exponential"},
    "GPT_Rec_parallel, a spike watched for": {
        "model.name": "GPT_Rec_parallel",
        "spike_factor": 3.0,
        "checkpoint_keep_every": 4,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_goes_on_exactly(tmp_path, monkeypatch, mode):
    config = config_in(tmp_path)
    config.update_from_flattened_dict(MODES[mode])
    loop.train(config, tmp_path / "whole")
    for step in (5, 6):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(SystemExit, match="130"):
                loop.train(config, tmp_path / "parts")
    loop.train(config, tmp_path / "parts")
    both = (judge.read(tmp_path / name) for name in ("whole", "parts"))
    assert judge.differences(*both, all_steps=False) == []
