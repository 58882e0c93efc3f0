"""Checks that all hosts of a run have the same configuration, data and run directory."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nrgpt_jax.errors import UserError
from nrgpt_jax.processes import gather_texts, host0_first, raise_on_all_hosts
from nrgpt_jax.runs.directory import differences


def check_same(config: Mapping[str, Any]) -> None:
    """Raise UserError on all processes if their configurations or data differ."""
    texts = gather_texts(json.dumps(config))
    for index, text in enumerate(texts):
        if text != texts[0]:
            first, *_ = differences(json.loads(texts[0]), json.loads(text))
            raise UserError(
                f"processes 0 and {index} were not started alike: {first}; start all of them with "
                "the same command and the same data"
            )


def check_shared(workdir: Path) -> None:
    """Raise UserError on all processes if they do not share the run directory."""
    if jax.process_count() == 1:
        return
    mark, token = workdir / "mark", gather_texts(uuid.uuid4().hex)[0]
    host0_first(lambda: mark.write_text(token))

    def check() -> None:
        if not mark.exists() or mark.read_text() != token:
            raise UserError(f"{workdir} is not one folder that all hosts share; name another one")

    try:
        raise_on_all_hosts(check)
    finally:
        host0_first(lambda: mark.unlink(missing_ok=True))
