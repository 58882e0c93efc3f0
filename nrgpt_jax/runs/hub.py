"""Models on the Hugging Face hub: safetensors, configuration, tokenizer and a model card."""

import tempfile
from pathlib import Path
from typing import Any

import jax

from nrgpt_jax import __version__
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.pretrained import HUB as PREFIX
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained, save_pretrained


def push(
    folder: Path | str, repository: str, *, private: bool = True, checkpoint: str = "best"
) -> str:
    """Upload a run or an exported folder as a model repository `USER/NAME`; return its address.

    Raises:
      UserError: the run does not exist, or the hub rejects it.
    """
    pretrained = load_pretrained(folder, checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        save_pretrained(temporary, pretrained)
        (Path(temporary) / "README.md").write_text(card(pretrained, repository))
        hub = _hub()
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            return str(hub.upload_folder(repo_id=repository, folder_path=temporary))
        except Exception as error:  # the hub, HTTP and its checks raise their own types
            raise _refused(repository, error) from None


def pull(repository: str, folder: Path | str | None = None) -> Path:
    """Download a model repository; return its folder, which `load_pretrained` opens.

    Args:
      repository: USER/NAME, optionally with the prefix `hf://`.
      folder: the target folder; None: the cache of the hub.

    Raises:
      UserError: the repository cannot be downloaded, or the folder is not empty.
    """
    name = repository.removeprefix(PREFIX)
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise UserError(f"{folder} is there already, and not empty; name another --out")
    try:
        return Path(_hub().snapshot_download(name, local_dir=folder))
    except UserError:
        raise
    except Exception as error:
        raise _refused(name, error) from None


def card(pretrained: Pretrained, repository: str) -> str:
    """Return the model card: the run's recorded settings, and how to use the model."""
    config, model = pretrained.config, pretrained.model
    count = sum(leaf.size for leaf in jax.tree.leaves(pretrained.variables["params"]))
    rows = {
        "model": config.model.name,
        "parameters": f"{count:,}",
        "width D, heads H, steps T": f"{model.embed_dim}, {model.num_heads}, {model.num_steps}",
        "context length N": f"{model.context_length:,}",
        "tokenizer": f"{pretrained.tokenizer.kind}, {pretrained.tokenizer.size:,} tokens",
        "trained on": config.data.name,
        "training steps": f"{config.train_steps:,}",
        "seed": config.seed,
        "nrgpt-jax": __version__,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: nrgpt-jax
pipeline_tag: text-generation
tags: [energy-based-model, jax, flax]
---
# {repository.rpartition("/")[2]}

An energy-based language model of NRGPT ([arXiv 2512.16762](https://arxiv.org/abs/2512.16762)).

| | |
|---|---|
{table}

```python
import nrgpt_jax as nrgpt

model, variables, tokenizer, config = nrgpt.load_pretrained("{PREFIX}{repository}")
```
"""


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "models on the hub need the library huggingface_hub: pip install 'nrgpt-jax[hf]'"
        ) from None
    return huggingface_hub


def _refused(repository: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{PREFIX}{repository}: {reason}")
