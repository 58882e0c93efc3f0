"""The names that `config.model.name` may have."""

from nrgpt_jax.core.energies import FEEDFORWARD

NRGPT_PREFIX = "NRGPT_H_"
BASELINES = ("GPT", "GPT_Rec", "GPT_Rec_parallel")


def model_names() -> list[str]:
    """`NRGPT_H_<feed-forward energy>` for every registered one, and the baselines."""
    return [NRGPT_PREFIX + name for name in FEEDFORWARD] + list(BASELINES)


def is_nrgpt(name: str) -> bool:
    """Whether the name stands for an energy model (else it is a baseline)."""
    return name.startswith(NRGPT_PREFIX)
