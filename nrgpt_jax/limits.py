"""The table of ranges of all numeric configuration fields, checked before anything runs.

Conditions on several fields, or on names, are checked in the module of the part:
`models.model_checks`, `datasets.data_checks`, `training.config_checks`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from nrgpt_jax.configs import flattened
from nrgpt_jax.errors import require


class Range(NamedTuple):
    """The interval from `least` to `most`, closed by default."""

    least: float
    most: float
    open: str = ""  # "(": excludes least; ")": excludes most

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        above = self.least < value if "(" in self.open else self.least <= value
        return above and (value < self.most if ")" in self.open else value <= self.most)

    def __str__(self) -> str:
        low = "above" if "(" in self.open else "at least"
        high = "below" if ")" in self.open else "at most"
        least, most = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in self[:2])
        return f"{low} {least}" + (f", {high} {most}" if self.most < math.inf else "")


LARGEST_SEED = 2**32 - 1  # JAX truncates larger seeds: 2**32 is 0
LARGEST_DEPTH = 2**16  # recurrent steps
_COUNT, _COUNT_OR_NONE = Range(1, 2**31 - 1), Range(0, 2**31 - 1)  # steps are counted in 32 bits
_DEPTH, _DEPTH_OR_NONE = Range(1, LARGEST_DEPTH), Range(0, LARGEST_DEPTH)
_SEED = Range(0, LARGEST_SEED)
_FACTOR = Range(1e-12, 1e12)  # float32 can still divide by and square these
_NOT_NEGATIVE = Range(0, math.inf)
_SHARE, _SHARE_OPEN = Range(0, 1), Range(0, 1, "()")

LIMITS: Mapping[str, Range] = {
    "seed": _SEED,
    "train_steps": _COUNT,
    "log_every": _COUNT,
    "eval_every": _COUNT,
    "eval_windows": _COUNT,
    "eval_prompts": _COUNT_OR_NONE,
    "checkpoint_every": _COUNT,
    "checkpoint_keep": Range(2, 2**31 - 1),  # the latest checkpoint may be damaged, or bad
    "checkpoint_keep_every": _COUNT_OR_NONE,
    "max_skipped_steps": _COUNT,
    "spike_factor": _NOT_NEGATIVE,
    "model.vocab_size": Range(0, 2**24),
    "model.context_length": Range(1, 2**22),
    "model.embed_dim": Range(1, 2**18),
    "model.num_heads": Range(1, 2**14),
    "model.num_steps": _DEPTH,
    "model.mlp_ratio": Range(0, 2**10, "("),
    "model.dropout": Range(0, 1, ")"),
    "model.scan_unroll": _DEPTH,
    "model.num_distinct_layers": _DEPTH_OR_NONE,
    "model.head_dim": Range(0, 2**18),
    "model.beta": _FACTOR,
    "model.inference_rate_init": _FACTOR,
    "model.inference_rate_decay": Range(0, 1, "("),
    "model.full_steps": _DEPTH_OR_NONE,
    "model.line_search": Range(0, 64),
    "data.validation_fraction": _SHARE_OPEN,
    "data.train_fraction": Range(0, 1, "("),
    "data.batch_size": Range(1, 2**24),
    "data.listops.modulus": Range(2, 2**12),
    "data.listops.depth": Range(1, 2**6),
    "data.listops.min_arguments": Range(1, 2**6),
    "data.listops.max_arguments": Range(1, 2**6),
    "data.listops.function_probability": _SHARE,
    "data.listops.exclusion_rate": _SHARE,
    "data.listops.num_train": Range(1, 10**9),
    "data.listops.num_test": Range(1, 10**7),
    "data.listops.seed": _SEED,
    "optimizer.learning_rate": Range(0, math.inf, "("),
    "optimizer.final_learning_rate": _NOT_NEGATIVE,
    "optimizer.warmup_steps": _COUNT_OR_NONE,
    "optimizer.beta1": Range(0, 1, ")"),
    "optimizer.beta2": Range(0, 1, ")"),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "optimizer.accumulation_steps": _COUNT,
    "depth.min_steps": _DEPTH_OR_NONE,
    "depth.max_steps": _DEPTH_OR_NONE,
    "depth.curriculum_steps": _COUNT_OR_NONE,
    "depth.backprop_steps": _DEPTH_OR_NONE,
    "depth.loss_steps": _DEPTH,
    "depth.refine_passes": _DEPTH_OR_NONE,
    "depth.max_burn_in_passes": _DEPTH_OR_NONE,
    "depth.consistency": _NOT_NEGATIVE,
    "depth.penalty": _NOT_NEGATIVE,
    "depth.penalty_bound": _NOT_NEGATIVE,
}


def check_limits(config: Mapping[str, Any], group: str = "") -> None:
    """Check every number of a configuration, or of a group of its fields such as `model`.

    Raises:
      UserError: a number is not finite or out of range; the message names field, value and range.
    """
    for name, value in flattened(config, f"{group}." if group else "").items():
        if isinstance(value, float):
            require(math.isfinite(value), name, value, "a finite number")
        if name in LIMITS:
            require(value in LIMITS[name], name, value, str(LIMITS[name]))
