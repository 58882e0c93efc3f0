"""Opening runs whose files have random contents, foreign or damaged."""

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from studies.reliability.attempts import counted, drawn, heard, judged
from studies.reliability.damage import DAMAGES, write
from studies.reliability.judge import bits
from studies.reliability.report import Part

METRICS_FILE = "metrics.jsonl"
FILES = ("config.json", "tokenizer.json", WEIGHTS_FILE, checksums.FILE_NAME, METRICS_FILE)
AGES = ("new", "run", "older")  # with all checksums; only those in JSON records; none
FOLDER = b"a folder"  # stands for a folder in place of the file

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 10**12, -(10**12), 10**300),
    *(0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "a" * 5000, "</script>", "é", "\u0000", "../../x", "https://u:p@h/x", "nan"),
    *([], {}, [[]], [None], ["a", "a"], {"x": {"y": []}}),
)
TEXTS = st.text(max_size=12)
VALUES = st.recursive(
    st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
RAW = st.one_of(
    st.binary(max_size=64),
    VALUES.map(lambda value: as_json(value)),
    st.integers(500, 200_000).map(lambda depth: b"[" * depth),
    st.integers(500, 20_000).map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth),
    st.just(b"\xff\xfe" + "{}".encode("utf-16-le")),
)
WAYS: tuple[Callable[[np.ndarray], Any], ...] = (  # changes to an array; None: removed
    lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.float32(np.nan), a),
    lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.float32(np.inf), a),
    lambda a: a[None],
    lambda a: np.concatenate([a.ravel()] * 2),
    *(lambda a, kind=kind: a.astype(kind) for kind in (np.float64, np.float16, np.int32, bool)),
    lambda a: np.zeros(0, np.float32),
    lambda a: None,
)


Case = tuple[str, str, bytes | None]  # file name, one of AGES, new contents; None: deleted


def small(folder: Path) -> Pretrained:
    """Export a small model with random parameters to a folder, without compilation."""
    config = default_config()
    config.model.update({"vocab_size": 12, "context_length": 8, "embed_dim": 4, "num_steps": 2})
    config.data.name = "text"
    model, random = create_model(config), np.random.default_rng(0)
    shapes = parameter_shapes(model).items()
    flat = {name: np.asarray(random.normal(size=shape), np.float32) for name, shape in shapes}
    variables = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    saved = Pretrained(model, variables, CharTokenizer("abcdefghij"), config)
    save_pretrained(folder, saved)
    lines = [{"step": step, "train/loss": 3.0 - 0.1 * step} for step in range(1, 6)]
    (folder / METRICS_FILE).write_bytes(as_lines(lines))
    return saved


def without_checksums(folder: Path) -> None:
    """Remove the checksums of an exported folder, as if written by an older version."""
    (folder / checksums.FILE_NAME).unlink()
    for name in ("config.json", "tokenizer.json"):
        record = json.loads((folder / name).read_text())
        record.pop("checksum", None)
        (folder / name).write_text(json.dumps(record))


# Contents -----------------------------------------------------------------------------------------


def as_json(value: Any) -> bytes:
    """Return JSON, also of NaN and of unpaired surrogates."""
    return json.dumps(value).encode()


def as_lines(records: Any) -> bytes:
    """Return one line of JSON per record."""
    return b"".join(as_json(r) + b"\n" for r in records)


def damaged(content: bytes) -> st.SearchStrategy[Any]:
    """Return a strategy for the contents, damaged or unchanged."""
    ways, places = st.sampled_from(list(DAMAGES.values())), st.floats(0.0, 1.0, exclude_max=True)
    cases = st.builds(lambda damage, place: damage(content, place), ways, places)
    return st.one_of(cases, cases, st.sampled_from((content, FOLDER)))


def places_of(record: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in a record."""
    for key in record if isinstance(record, dict) else range(len(record)):
        yield record, key
        if isinstance(record[key], dict | list):
            yield from places_of(record[key])


@st.composite
def mutations(draw, record: Any) -> Any:
    """Return a record with one field or entry removed, added or replaced."""
    record = copy.deepcopy(record)
    container, key = draw(st.sampled_from(list(places_of(record))))
    action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
    if action == "remove":
        del container[key]
    elif action == "replace":
        container[key] = draw(VALUES)
    elif isinstance(container, dict):
        container[draw(TEXTS)] = draw(VALUES)
    else:
        container.insert(key, draw(VALUES))
    return record


def foreign(template: Path, name: str) -> st.SearchStrategy[bytes]:
    """Return a strategy for other contents of a file: of the same format, or arbitrary."""
    content = (template / name).read_bytes()
    if name == WEIGHTS_FILE:
        return st.one_of(_weights(content), RAW)
    if name == METRICS_FILE:
        lines = [json.loads(line) for line in content.splitlines()]
        return st.one_of(mutations(lines).map(as_lines), RAW)
    record = json.loads(content)
    bare = {field: value for field, value in record.items() if field != "checksum"}
    return st.one_of(st.one_of(mutations(record), mutations(bare)).map(as_json), RAW)


def _weights(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for weights with other dtypes, shapes, names, values or headers."""
    arrays, size = safetensors.load(content), int.from_bytes(content[:8], "little")

    def changed(name: str, way: Callable[[np.ndarray], Any]) -> bytes:
        others = {**arrays, name: way(arrays[name])}
        return safetensors.save({k: v for k, v in others.items() if v is not None})

    def headed(header: Any) -> bytes:
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return st.one_of(
        st.builds(changed, st.sampled_from(sorted(arrays)), st.sampled_from(WAYS)),
        mutations(json.loads(content[8 : 8 + size])).map(headed),
        st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + content[8:]),
    )


# Judging ------------------------------------------------------------------------------------------


def opened(path: Path, age: str, saved: Pretrained) -> str:
    """Return the outcome of opening a folder of this age whose file `path` was changed."""
    with heard() as said:
        if path.name == METRICS_FILE:
            sound = all(type(line.get("step")) is int for line in read_metrics(path.parent))
            return "fine" if sound else "silent"
        found = load_pretrained(path.parent)
    warned = "warning" if said.getvalue() else ""
    if values(found) == values(saved):
        return warned or "fine"
    if age == "run" and path.suffix == ".json" and "checksum" in json.loads(path.read_text()):
        return "silent"
    return warned or "silent"  # without checksums, valid contents can only be accepted


def values(opened: Pretrained) -> tuple:
    """Return the comparable values: configuration, tokenizer and parameters."""
    return opened.config.to_dict(), as_record(opened.tokenizer), bits(opened.variables)


def run(cases: int, seed: int, jobs: int = 1, files: tuple[str, ...] = FILES) -> dict[str, Any]:
    """Foreign and damaged files.

    One file of an exported folder receives random contents, valid or invalid, and the folder is
    opened. *Fine*: it opens unchanged. *Warning*: contents that are possible in a folder without
    checksums are accepted. A traceback, a hang, or wrong values without a message are failures.
    """
    del jobs
    with tempfile.TemporaryDirectory() as root:
        templates = {age: Path(root) / age for age in AGES}
        saved, *_ = [small(folder) for folder in templates.values()]
        (templates["run"] / checksums.FILE_NAME).unlink()
        without_checksums(templates["older"])

        @st.composite
        def case(draw) -> Case:
            name = draw(st.sampled_from(files))
            age = "new" if name == checksums.FILE_NAME else draw(st.sampled_from(AGES))
            other, content = foreign(templates["new"], name), (templates[age] / name).read_bytes()
            return name, age, draw(st.one_of(damaged(content), other, other))

        def judge(case: Case) -> tuple[str, str]:
            name, age, content = case
            folder = Path(root) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(templates[age], folder)
            write(folder / name, None if content == FOLDER else content)
            if content == FOLDER:
                (folder / name).mkdir()
            return judged(lambda: opened(folder / name, age, saved))

        return counted(drawn(case(), judge, cases, seed))


PART = Part("file", 1000, run)
