"""Models of the authors' PyTorch release, from a clone of its repository."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


def build(clone: str, config: ConfigDict) -> Any:
    """Build the release's torch module for a configuration, on the GPU if there is one."""
    import torch

    sys.path[:0] = [clone, f"{clone}/models"]
    settings = importlib.import_module("model_config").ModelConfig
    m = config.model
    torch.manual_seed(0)
    model: Any = getattr(importlib.import_module("models"), m.name)(
        settings(
            block_size=m.context_length,
            n_embed=m.embed_dim,
            n_layer=m.num_steps,
            n_head=m.num_heads,
            vocab_size=m.vocab_size,
            tril_plus_one=m.mask == "strict",
        )
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def training_step(clone: str, config: ConfigDict, tokens: Any, compiled: bool) -> Callable:
    """Return a function that takes one training step and returns its loss.

    AdamW with weight decay on matrices and clipping at norm 1, as in the release's training
    script, which cannot be imported without starting it.

    Args:
      clone: folder of the clone.
      config: this library's configuration of the model.
      tokens: (B,N+1) integers.
      compiled: whether to use torch.compile.
    """
    import torch

    m, model = config.model, build(clone, config)
    device = next(model.parameters()).device.type
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=fused)
    inputs, targets = (
        torch.tensor(part, dtype=torch.long, device=device)
        for part in (tokens[:, :-1], tokens[:, 1:])
    )
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=m.dtype == "bfloat16"):
            _, loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
