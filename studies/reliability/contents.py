"""Foreign and damaged contents of the files of a run, drawn at random, and how they are opened.

    from studies.reliability import contents
    contents.run(cases=1000, seed=0)

A case damages one file of an exported folder, or gives it other contents, and opens the folder.
It must open as it was, or end in one line that is a UserError. Where the folder is of an older
version, without checksums, contents that are possible are taken for what they are, with a warning.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from nrgpt_jax.configs import default_config
from nrgpt_jax.datasets.tokenizers import CharTokenizer, as_record
from nrgpt_jax.models import create_model, parameter_shapes
from nrgpt_jax.runs import checksums
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE, Pretrained, load_pretrained, save_pretrained
from studies.reliability import tally
from studies.reliability.tally import judged, warnings_counted
from studies.reliability.values import (
    DAMAGES,
    ODD,
    RAW,
    Change,
    as_json,
    copied,
    mutations,
    replaced,
)

TITLE, CASES = "Foreign and damaged contents of files", 1000

METRICS_FILE = "metrics.jsonl"
FILES = ("config.json", "tokenizer.json", WEIGHTS_FILE, checksums.FILE_NAME, METRICS_FILE)
AGES = ("new", "run", "older")  # with all checksums; those in the records alone; without any


class Case(NamedTuple):
    """A file of a folder with or without checksums, and what is done to it."""

    file: str
    age: str
    change: Change


def small(folder: Path) -> Pretrained:
    """A small model of random parameters, in an exported folder; nothing is compiled."""
    config = default_config()
    config.model.update({"vocab_size": 12, "context_length": 8, "embed_dim": 4, "num_steps": 2})
    config.data.name = "text"
    model, draw = create_model(config), np.random.default_rng(0)
    flat = {
        name: np.asarray(draw.normal(size=shape), np.float32)
        for name, shape in parameter_shapes(model).items()
    }
    variables = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    made = Pretrained(model, variables, CharTokenizer("abcdefghij"), config)
    save_pretrained(folder, made)
    lines = [{"step": step, "train/loss": 3.0 - 0.1 * step} for step in range(1, 6)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def without_checksums(folder: Path) -> None:
    """Makes an exported folder what an older version would have written."""
    (folder / checksums.FILE_NAME).unlink()
    for name in ("config.json", "tokenizer.json"):
        record = json.loads((folder / name).read_text())
        record.pop("checksum", None)
        (folder / name).write_text(json.dumps(record))


def _weights(template: Path) -> st.SearchStrategy[Change]:
    """Other contents of the parameters: types, shapes, names, values, and the header itself."""
    arrays = safetensors.load_file(template / WEIGHTS_FILE)
    names = sorted(arrays)

    def changed(name: str, how: Callable[[np.ndarray], Any]) -> Change:
        others = {**arrays, name: how(arrays[name])}
        return replaced(safetensors.save({k: v for k, v in others.items() if v is not None}))

    def spoilt(value: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.float32(value), a)

    ways: tuple[Callable[[np.ndarray], Any], ...] = (
        *(
            spoilt(np.nan),
            spoilt(np.inf),
            lambda a: a[None],
            lambda a: np.concatenate([a.ravel()] * 2),
        ),
        *(lambda a: a.astype(np.float64), lambda a: a.astype(np.float16), lambda a: a.astype(bool)),
        *(lambda a: a.astype(np.int32), lambda a: None, lambda a: np.zeros(0, np.float32)),
    )
    content = (template / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def headed(new: Any) -> Change:
        text = as_json(new)
        return replaced(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return st.one_of(
        st.builds(changed, st.sampled_from(names), st.sampled_from(ways)),
        mutations(header).map(headed),
        st.integers(0, 2**64 - 1).map(lambda n: replaced(n.to_bytes(8, "little") + content[8:])),
    )


def _lines(template: Path) -> st.SearchStrategy[Change]:
    """A file of metrics with a line changed, or with another line."""
    lines = [json.loads(line) for line in (template / METRICS_FILE).read_text().splitlines()]
    whole = lambda records: replaced(b"".join(as_json(r) + b"\n" for r in records))
    other = st.sampled_from(ODD).map(lambda value: whole([*lines, value]))
    return st.one_of(
        mutations(lines).map(lambda r: whole(r if isinstance(r, list) else [r])), other
    )


def _record(template: Path, name: str) -> st.SearchStrategy[Change]:
    record = json.loads((template / name).read_text())
    bare = {field: value for field, value in record.items() if field != "checksum"}
    return st.one_of(mutations(record), mutations(bare)).map(lambda r: replaced(as_json(r)))


def _foreign(template: Path, name: str) -> st.SearchStrategy[Change]:
    own = {WEIGHTS_FILE: _weights, METRICS_FILE: _lines}.get(name)
    return st.one_of(own(template) if own else _record(template, name), RAW)


def _opened(folder: Path, made: Pretrained, case: Case) -> str:
    with warnings_counted() as warned:
        if case.file == METRICS_FILE:
            sound = all(type(line.get("step")) is int for line in read_metrics(folder))
            return "fine" if sound else "silent"
        found = load_pretrained(folder)
    if _same(found, made):
        return "warning" if warned else "fine"
    if case.age == "run" and _has_checksum(folder / case.file):
        return "silent"
    # Without a checksum what is possible is taken for what was written.
    return "warning" if warned else "silent"


def _has_checksum(path: Path) -> bool:
    return path.suffix == ".json" and "checksum" in json.loads(path.read_text())


def _same(one: Pretrained, other: Pretrained) -> bool:
    leaves = [jax.tree.leaves(p.variables) for p in (one, other)]
    return (
        one.config.to_dict() == other.config.to_dict()
        and as_record(one.tokenizer) == as_record(other.tokenizer)
        and all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    )


def run(
    cases: int = CASES, seed: int = 0, jobs: int = 1, file: str | None = None
) -> dict[str, Any]:
    """Counts of outcomes by name, and what is wrong. `file` names one of FILES; None: all."""
    del jobs
    with tempfile.TemporaryDirectory() as root:
        templates = {age: Path(root) / age for age in AGES}
        made, *_ = [small(folder) for folder in templates.values()]
        (templates["run"] / checksums.FILE_NAME).unlink()
        without_checksums(templates["older"])
        names = st.sampled_from(FILES) if file is None else st.just(file)
        foreign = {name: _foreign(templates["new"], name) for name in FILES}

        @st.composite
        def strategy(draw) -> Case:
            name = draw(names)
            age = "new" if name == checksums.FILE_NAME else draw(st.sampled_from(AGES))
            return Case(name, age, draw(st.one_of(DAMAGES, foreign[name], foreign[name])))

        def judge(case: Case) -> tuple[str, str]:
            folder = copied(templates[case.age], Path(root) / "case")
            case.change.apply(folder / case.file)
            return judged(lambda: _opened(folder, made, case))

        return tally.tally(strategy(), judge, cases, seed)


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    return [
        "A file of an exported folder (" + ", ".join(f"`{name}`" for name in FILES) + ") gets "
        "contents drawn at random, valid and not, and the folder is opened. *Fine*: it opens as it "
        "was; *warning*: what is possible in a folder without checksums is taken for what it is. A "
        "traceback, a hang, and wrong values without a word are mistakes.",
        "",
        *tally.lines(found),
    ]


__all__ = ["FILES", "run", "small", "without_checksums"]
