"""The measured models and sizes."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from nrgpt_jax.configs import default_config
from nrgpt_jax.models import model_names

TEXT = {"num_steps": 6, "context_length": 256, "vocab_size": 65}
LARGE = {"num_steps": 12, "context_length": 1024, "vocab_size": 50304, "dtype": "bfloat16"}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 128, "num_heads": 4, **TEXT},
    "medium": {"embed_dim": 384, "num_heads": 6, **TEXT},
    "listops": {
        **{"embed_dim": 32, "num_steps": 5, "context_length": 128},
        **{"vocab_size": 20, "mask": "strict"},
    },
    "openwebtext": {"embed_dim": 768, "num_heads": 12, **LARGE},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step: a model, a size, a batch and its number of accumulation steps."""

    size: str
    model: str
    batch: int
    parts: int = 1  # optimizer.accumulation_steps
    attention: str = "full_rank"
    accelerator: bool = False  # too large for a CPU

    @property
    def title(self) -> str:
        """The name of the case in tables and on the command line."""
        rank = "" if self.attention == "full_rank" else f" {self.attention}"
        return f"{self.size} {self.model}{rank}"

    def config(self) -> ConfigDict:
        """Return the configuration to measure."""
        config = default_config()
        config.model.name = self.model
        config.model.attention = self.attention
        config.model.update(SIZES[self.size])
        if not self.accelerator:
            config.model.scan_unroll = config.model.num_steps
        config.data.batch_size = self.batch
        config.optimizer.accumulation_steps = self.parts
        return config


def _parts(model: str) -> int:
    # Found by trial: slices whose working set fits into the cache of a core.
    return 8 if model.startswith("NRGPT") else 4


CASES = (
    *(Case("small", model, 16, _parts(model)) for model in model_names()),
    Case("medium", "NRGPT_H_FF2W", 8, 4),
    Case("listops", "NRGPT_H_FF2W", 64, 8),
    Case("openwebtext", "NRGPT_H_FF2W", 32, accelerator=True),
    Case("openwebtext", "NRGPT_H_FF2W", 32, attention="low_rank", accelerator=True),
    *(Case("openwebtext", model, 32, accelerator=True) for model in ("GPT", "GPT_Rec_parallel")),
)
