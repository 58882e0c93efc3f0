"""Values that nobody has planned for, and ways to damage a file."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 10**12, -(10**12), 10**300),
    *(0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "a" * 5000, "</script>", "é", "\u0000", "../../x", "https://u:p@h/x", "nan"),
    *([], {}, [[]], [None], ["a", "a"], {"x": {"y": []}}),
)
TEXTS = st.text(max_size=12)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


class Change(NamedTuple):
    """What is done to a file."""

    name: str
    apply: Callable[[Path], object]

    def __repr__(self) -> str:
        return self.name


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _flip(path: Path, share: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


SHARES = st.floats(0.0, 1.0, exclude_max=True)
DAMAGES = st.one_of(
    SHARES.map(lambda share: Change(f"truncate {share:.3f}", lambda p: _truncate(p, share))),
    st.just(Change("nothing", lambda path: None)),
    st.just(Change("empty", lambda path: path.write_bytes(b""))),
    st.just(Change("zero", lambda path: path.write_bytes(bytes(path.stat().st_size)))),
    st.just(Change("delete", lambda path: path.unlink())),
    st.just(Change("directory", _make_directory)),
    st.builds(
        lambda share, bit: Change(f"flip {share:.4f} {bit}", lambda p: _flip(p, share, bit)),
        SHARES,
        st.integers(0, 7),
    ),
)


def replaced(content: bytes) -> Change:
    """The content of the file replaced."""
    return Change(f"content {content[:80]!r}", lambda path: path.write_bytes(content))


def as_json(value: Any) -> bytes:
    """JSON, also of NaN and of half a character."""
    return json.dumps(value).encode()


RAW = st.one_of(
    st.binary(max_size=64).map(replaced),
    JSON.map(lambda value: replaced(as_json(value))),
    st.integers(500, 200_000).map(lambda depth: replaced(b"[" * depth)),
    st.integers(500, 20_000).map(lambda depth: replaced(b'{"a":' * depth + b"1" + b"}" * depth)),
    st.just(replaced(b"\xff\xfe" + "{}".encode("utf-16-le"))),
)


@st.composite
def mutations(draw, record: Any) -> Any:
    """A record with one field or entry removed, added or replaced by another value."""
    record = json.loads(json.dumps(record))
    place = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if action == "add" or not keys:
            value = draw(st.one_of(st.sampled_from(ODD), JSON))
            if isinstance(place, dict):
                place[draw(TEXTS)] = value
            else:
                place.append(value)
            return record
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and draw(st.integers(0, 3)):
            place = place[key]
            continue
        if action == "remove":
            del place[key]
        else:
            place[key] = draw(st.one_of(st.sampled_from(ODD), JSON))
        return record


def copied(template: Path, folder: Path) -> Path:
    """A fresh copy of a folder in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return folder
