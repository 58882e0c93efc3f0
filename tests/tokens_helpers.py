"""GPT-2's encoding where its table is here, and a tiny one of its kind."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import tiktoken

TABLES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def _is_kept() -> bool:
    """Whether tiktoken has fetched the table: a test does not wait for a download."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", default))
    names = [hashlib.sha1((TABLES + n).encode()).hexdigest() for n in ("vocab.bpe", "encoder.json")]
    return all((folder / name).is_file() for name in names)


needs_gpt2 = pytest.mark.skipif(
    not _is_kept(), reason="the GPT-2 vocabulary is not in TIKTOKEN_CACHE_DIR"
)


@functools.cache
def tiny_gpt2() -> tiktoken.Encoding:
    """All bytes, `th`, `the`, pairs across blanks, an end: GPT-2's pattern with 261 tokens."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
    ranks |= {b"\x80\n": 258, b"\n\n": 259}
    end = {"<|endoftext|>": 260}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)
