"""Texts in pieces that are tokenized one by one, as if they had been tokenized whole.

GPT-2 splits a text by a pattern before it joins bytes to pairs. A match of it is all blank, or
has at most one blank, at its beginning. A text may therefore be cut between a character that is
not blank and a blank: no match is cut, and both sides are matched as before. Where no blank is near
(Chinese, DNA), a text is cut between characters of two kinds, letters, numbers and others, which no
match holds but for `'s` and its like; and where all are of one kind, between any two characters.
"""

import bisect
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nrgpt_jax.datasets.files import BOM, File, is_packed, opened
from nrgpt_jax.errors import UserError

BLOCK = 2**20  # bytes read at once
LONGEST = 2**22  # bytes: a longer run without a blank is cut elsewhere
NEAR = 2**14  # bytes in which a place between two kinds of characters is looked for

# After a last byte of UTF-8 that does not end a blank beyond ASCII.
_BLANKS = rb"\xc2[\x85\xa0]", rb"\xe1\x9a\x80", rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
_NOT_AFTER = b"".join(rb"(?<!%b)" % b for b in (*_BLANKS, rb"\xe2\x81\x9f", rb"\xe3\x80\x80"))
_CUT = re.compile(rb"[!-~\x80-\xbf]" + _NOT_AFTER + rb"(?=[\t-\r ])")


class Cut(NamedTuple):
    """A place in a text, in bytes."""

    place: int
    clean: bool  # whether both sides have the tokens that they have in the whole


class Text:
    """One text of one or more UTF-8 files, with a line end between them; places are bytes.

    A byte order mark at the beginning of a file is no part of it.

    Raises:
      UserError: a file is packed, so that its size is not that of its text; or cannot be read.
    """

    def __init__(self, files: Sequence[File]):
        for file in files:
            if is_packed(file.name):
                raise UserError(f"{file.path} is packed; unpack it first")
        self.files = list(files)
        self._marks = [_length_of_mark(file) for file in self.files]
        self._sizes = [f.size - mark for f, mark in zip(self.files, self._marks, strict=True)]
        self._starts = [0, *itertools.accumulate(size + 1 for size in self._sizes)]
        self.size = max(0, self._starts[-1] - 1)

    def files_of(self, start: int, stop: int) -> tuple[list[File], int]:
        """The files that hold the bytes from `start` to `stop`, and the place of the first."""
        first = bisect.bisect_right(self._starts, start) - 1
        last = bisect.bisect_left(self._starts, stop)
        return self.files[first:last], self._starts[first]

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, in blocks; a block ends where its file does."""
        which = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            file, begin = self.files[which], self._starts[which]
            end = min(stop, begin + self._sizes[which])
            with opened(file.path) as opened_file:
                opened_file.seek(start - begin + self._marks[which])
                while start < end:
                    block = opened_file.read(min(BLOCK, end - start))
                    if not block:
                        raise UserError(f"{file.path} became shorter while it was read")
                    start += len(block)
                    yield block
            if start < stop:  # between two files
                yield b"\n"
                start += 1
            which += 1

    def pieces(self, start: int, stop: int) -> Iterator[str]:
        """The same as text, cut where a tokenizer does not mind.

        Raises:
          UserError: it is not UTF-8.
        """
        for piece in cut(self.blocks(start, stop)):
            try:
                yield piece.decode("utf-8")
            except UnicodeDecodeError as error:
                which = bisect.bisect_right(self._starts, start + error.start) - 1
                path = self.files[which].path
                raise UserError(f"{path} is not UTF-8 ({error}); convert it with iconv") from None
            start += len(piece)

    def place_to_cut(self, at: int, within: int = LONGEST) -> Cut:
        """The first place from byte `at` on where a tokenizer does not mind, if there is one.

        Args:
          at: a byte.
          within: how many bytes further the place may be; the end of the text is one.

        Returns:
          That place; or the first from `at` on where a character begins.
        """
        begin, observed = max(0, at - 4), b""
        if not 0 < at < self.size:
            return Cut(min(max(at, 0), self.size), True)
        first, last = at - begin, at - begin + within
        look = first - 1
        for block in self.blocks(begin, min(self.size, at + within + 4)):
            observed += block
            result = _CUT.search(observed, look)
            if result and result.end() <= last:
                return Cut(begin + result.end(), True)
            look = max(look, len(observed) - 1)
        if at + within >= self.size:
            return Cut(self.size, True)
        place = _between_kinds(observed, first, last)
        return Cut(begin + (place or _character_from(observed, first)), place is not None)


def _length_of_mark(file: File) -> int:
    with opened(file.path) as opened_file:
        return len(BOM) if opened_file.read(len(BOM)) == BOM else 0


def cut(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about a block that may be tokenized one by one."""
    pending, searched = b"", 0
    for block in blocks:
        pending += block
        if len(pending) >= BLOCK:
            at = _last_place(pending, searched)
            searched = 0 if at else len(pending) - 1
            if at:
                yield pending[:at]
                pending = pending[at:]
    if pending:
        yield pending


def cut_text(text: str) -> Iterator[str]:
    """A text in pieces of at most about a block."""
    if len(text) <= BLOCK // 4:
        return iter((text,))
    slices = (text[i : i + BLOCK].encode("utf-8") for i in range(0, len(text), BLOCK))
    return (piece.decode("utf-8") for piece in cut(slices))


def _last_place(observed: bytes, searched: int) -> int:
    """The last place to cut, behind what was searched in vain; 0: wait for more."""
    for begin in (max(searched, len(observed) - 2**12), searched):
        cuts = [result.end() for result in _CUT.finditer(observed, begin)]
        if cuts:
            return cuts[-1]
    if len(observed) <= LONGEST:
        return 0
    last = len(observed) - 4
    return _between_kinds(observed, last - NEAR, last) or _character_from(observed, last)


def _between_kinds(observed: bytes, first: int, last: int) -> int | None:
    """The first place between two kinds of characters, from byte `first` to byte `last`."""
    last = min(last, first + NEAR)
    place = _character_from(observed, max(0, first - 4))
    text = observed[place : last + 4].decode("utf-8", "ignore")
    for one, other in itertools.pairwise(text):
        place += len(one.encode())
        if first <= place <= last and _may_part(one, other):
            return place
    return None


def _may_part(one: str, other: str) -> bool:
    """Whether no match of GPT-2's pattern holds both of two neighbouring characters."""
    kinds = _kind(one), _kind(other)
    return kinds[0] not in ("", "blank", kinds[1]) and kinds[1] != "" and one != "'"


def _kind(character: str) -> str:
    """As GPT-2's pattern tells characters apart; "" of those that versions of Unicode may not."""
    category = unicodedata.category(character)
    if category == "Cn" or "\x1c" <= character <= "\x1f":
        return ""
    if character.isspace():
        return "blank"
    return category[0] if category[0] in "LN" else "other"


def _character_from(observed: bytes, at: int) -> int:
    """The first place from `at` on where a character of UTF-8 begins."""
    return next((i for i in range(at, len(observed)) if observed[i] & 0xC0 != 0x80), len(observed))
