"""Texts in pieces that are tokenized one by one, with the tokens of the whole text.

tiktoken encodes one string in memory and cannot stream a text of any length, so a text is cut here
where no match of GPT-2's pattern spans the cut. A match is all blank, or has at most one blank, at
its beginning: a text may be cut between a non-blank character and a blank. Where no blank is near
(Chinese, DNA), it is cut between characters of two kinds (letters, numbers, others), which no match
contains except `'s` and the like. If all are of one kind, it is cut between any two characters.
"""

import codecs
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nrgpt_jax.datasets.files import BOM, File, opened
from nrgpt_jax.errors import UserError

BLOCK = 2**20  # bytes per read
LONGEST = 2**22  # a longer run without a blank is cut elsewhere
NEAR = 2**14  # bytes searched for a boundary between two kinds of characters

_CUT = re.compile(r"[^\s\x00-\x1f\x7f](?=[\t-\r ])")
_LAST_CUT = re.compile(rf"(?s:.*){_CUT.pattern}")


class Cut(NamedTuple):
    """A position in a text, in bytes."""

    place: int
    clean: bool  # whether a cut here leaves the tokens of both sides unchanged


class Text:
    """One text of one or more UTF-8 files, joined by line ends; positions are in bytes.

    A byte order mark at the beginning of a file is skipped.

    Raises:
      UserError: a file cannot be read.
    """

    def __init__(self, files: Sequence[File]):
        self.files = list(files)
        # path, begin and end of the file in the whole text, offset to a position in the file
        self._spans: list[tuple[str, int, int, int]] = []
        begin = 0
        for file in files:
            with opened(file.path) as data:
                mark = len(BOM) if data.read(len(BOM)) == BOM else 0
            end = begin + file.size - mark
            self._spans.append((file.path, begin, end, mark - begin))
            begin = end + 1
        self.size = max(0, begin - 1)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Yield the bytes from `start` to `stop` in blocks, each with the path of its file."""
        for path, begin, end, offset in self._spans:
            place, last = max(start, begin), min(stop, end)
            if place < last:
                with opened(path) as file:
                    file.seek(place + offset)
                    while place < last:
                        block = file.read(min(BLOCK, last - place))
                        if not block:
                            raise UserError(f"{path} became shorter while it was read")
                        place += len(block)
                        yield path, block
            if start <= end < stop:  # between two files
                yield path, b"\n"

    def pieces(self, start: int, stop: int) -> Iterator[str]:
        """Yield the text from byte `start` to `stop` in pieces that may be tokenized one by one.

        Raises:
          UserError: the text is not UTF-8.
        """
        return cut(self._decoded(start, stop))

    def _decoded(self, start: int, stop: int) -> Iterator[str]:
        decoder, path = codecs.getincrementaldecoder("utf-8")(), ""
        for path_of_block, block in itertools.chain(self.blocks(start, stop), [("", b"")]):
            path = path_of_block or path
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                cure = "unpack it, or convert it with iconv"
                raise UserError(f"{path} is not UTF-8 ({error}); {cure}") from None
            yield text

    def place_to_cut(self, at: int, within: int = LONGEST) -> Cut:
        """Return the first position from byte `at` on where a cut changes no tokens.

        Args:
          at: the first byte to consider.
          within: the number of bytes to search; the end of the text is a possible position.

        Returns:
          That position; if there is none, the first beginning of a character from `at` on.
        """
        if not 0 < at < self.size:
            return Cut(min(max(at, 0), self.size), True)
        begin = max(0, at - 4)
        blocks = self.blocks(begin, min(self.size, at + within + 4))
        data = b"".join(block for _, block in blocks)
        first = next((i for i in range(at - begin, len(data)) if data[i] & 0xC0 != 0x80), len(data))
        before = data[:first].decode("utf-8", "ignore")[-1:]
        text = before + data[first:].decode("utf-8", "ignore")
        place_of = lambda index: begin + first + len(text[len(before) : index].encode())
        found = _CUT.search(text)
        if found and (place := place_of(found.end())) <= at + within:
            return Cut(place, True)
        if at + within >= self.size:
            return Cut(self.size, True)
        index = _between_kinds(text[: NEAR + 2])
        if index and (place := place_of(index)) <= at + min(within, NEAR):
            return Cut(place, True)
        return Cut(begin + first, False)


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the same text in pieces of about a block that may be tokenized one by one."""
    pending = ""
    for block in blocks:
        pending += block
        if len(pending) < BLOCK:
            continue
        found = _LAST_CUT.match(pending)
        if found:
            at = found.end()
        elif len(pending) > LONGEST:
            start = max(0, len(pending) - NEAR)
            at = start + (_between_kinds(pending[start:]) or len(pending) - start)
        else:
            continue
        yield pending[:at]
        pending = pending[at:]
    if pending:
        yield pending


def cut_text(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most about a block."""
    return cut(text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


def _between_kinds(text: str) -> int | None:
    """Return the first index where no match of GPT-2's pattern spans both neighbours."""
    for i, (one, other) in enumerate(itertools.pairwise(text), 1):
        kind, after = _kind(one), _kind(other)
        if kind not in ("", "blank", after) and after and one != "'":
            return i
    return None


def _kind(character: str) -> str:
    """Return a character's class in GPT-2's pattern; "" if versions of Unicode may differ."""
    category = unicodedata.category(character)
    if category == "Cn" or "\x1c" <= character <= "\x1f":
        return ""
    if character.isspace():
        return "blank"
    return category[0] if category[0] in "LN" else "other"
