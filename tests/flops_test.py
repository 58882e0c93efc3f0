"""Model FLOPs equal what XLA counts in the forward pass in closed form, but for the masked half."""

import jax
import jax.numpy as jnp
import pytest
from marks import slow_but

from nrgpt_jax.configs import default_config
from nrgpt_jax.core.energies import ENERGIES, attention
from nrgpt_jax.core.parameters import matrix
from nrgpt_jax.models import create_model, flops, model_names

N = 64


def model_config(**fields):
    config = default_config().model
    config.update({"vocab_size": 96, "context_length": N, "embed_dim": 64, "num_heads": 4})
    config.update({"num_steps": 3, "scan_unroll": 3, "implementation": "blocked", **fields})
    return config


def counted_by_xla(config):
    """Operations a token of the compiled forward pass."""
    model, tokens = create_model(config), jax.ShapeDtypeStruct((2, N), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    analysis = jax.jit(model.apply).lower(params, tokens).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"] / (2 * N)


# XLA computes the gate of FFG_first once for all steps.
CASES = [{"name": name} for name in model_names() if name != "NRGPT_H_FFG_first"] + [
    {"attention": "low_rank", "name": "NRGPT_H_FF1"},
    {"attention": "low_rank", "head_dim": 8, "name": "NRGPT_H_FF2W", "inference_rate": "scalar"},
    {"num_heads": 1, "mlp_ratio": 2, "name": "NRGPT_H_FF2W"},
    {"attention": "full_rank_rope", "name": "NRGPT_H_FF1"},
    {
        "attention": "low_rank_rope",
        "energies": ("injection",),
        "name": "NRGPT_H_FF1",
        "num_distinct_layers": 3,
    },
    {"inference_rate": "psd", "rule": "momentum", "combination": "mixture", "name": "NRGPT_H_FF1"},
]


@pytest.mark.ci
@pytest.mark.parametrize(
    "fields", slow_but(CASES[::2], CASES), ids=lambda fields: "-".join(map(str, fields.values()))
)
def test_flops_are_those_of_the_compiled_model(fields):
    config = model_config(**fields)
    found = flops.train_flops_per_token(create_model(config))
    width = config.embed_dim
    if config.name.startswith("NRGPT"):
        full_rank = config.attention.startswith("full_rank")
        score_width = width if full_rank else config.head_dim or width // config.num_heads
        masked = 2 * N * config.num_heads * score_width
    else:
        masked = 2 * N * width
    expected = counted_by_xla(config) - config.num_steps * masked
    # XLA also counts norms, softmax and gelu.
    assert 0.93 * expected < found / 3 <= 1.0 * expected


def test_an_attention_of_ones_own_is_counted_as_the_others_are():
    attention("mine", {"J": matrix("H D D", uses=1)})(
        lambda params, g, position: jnp.einsum("hed,d->he", params["J"], g)
    )
    try:
        mine, known = (
            flops.train_flops_per_token(create_model(model_config(attention=name)))
            for name in ("mine", "full_rank")
        )
    finally:
        ENERGIES.remove("mine")
    assert mine == known


def test_an_unknown_chip_has_no_peak(monkeypatch):
    monkeypatch.setattr(flops, "_measured_cpu_peak", lambda: 1e9)
    assert flops.peak_flops() == 1e9


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5", 459e12),
        ("?", None),
    ],
)
def test_peaks_of_chips(monkeypatch, kind, peak):
    class Device:
        platform, device_kind = "accelerator", kind

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert flops.peak_flops() == (peak and 4 * peak)
