"""Checks how pages are written: the limits and the words of CONTRIBUTING.md's section on style.

    python docs/prose.py [FILE ...]

reads README.md, CONTRIBUTING.md, the pages of docs/, and the docstrings, comments and messages of
the code, or the files that are named, and prints a line for everything that is against the style.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, PARAGRAPH, SENTENCE = 7, 90, 35  # the most; of paragraphs and sentences, in words
_NO_TEXT = ("#", "|", "!", "<", ":::")  # lines that begin so are no text
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
CODE = ("nrgpt_jax/**/*.py", "experiments/*.py", "studies/**/*.py", "benchmarks/*.py", "launch/*")
_ROW = re.compile(r"^\| `(?P<pattern>[^`]+)` \|", re.MULTILINE)  # of the table of banned words


def banned() -> re.Pattern[str]:
    """The words that CONTRIBUTING.md replaces, as one pattern."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("### Words")[2]
    words = [row["pattern"].replace("\\|", "|") for row in _ROW.finditer(section)]
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs and list items of a page with their line numbers, without code and tables."""
    lines, fenced, begin = list[str](), False, 0
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        fence = line.lstrip().startswith("```")
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        if fence or fenced or item or not line.strip() or line.startswith(_NO_TEXT):
            if lines:
                yield begin, " ".join(lines)
            lines, begin = ([line[item.end() :]] if item and not fenced else []), number
        else:
            begin = begin if lines else number
            lines.append(line.strip())
        fenced ^= fence


def plain(text: str) -> str:
    """A paragraph without links' targets, code spans and emphasis, each of which is a word."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\$[^$]+\$|`[^`]+`", "X", text)
    return re.sub(r"[*_]{1,2}", "", text)


def of_page(text: str) -> Iterator[tuple[int, str]]:
    """What is against the limits of a page."""
    for number, line in enumerate(text.splitlines(), start=1):
        columns = len(re.findall(r"(?<!\\)\|", line)) - 1
        if line.startswith("|") and columns > COLUMNS:
            yield number, f"a table of {columns} columns (at most {COLUMNS})"
    for number, paragraph in paragraphs(text):
        words = plain(paragraph)
        count = len(words.split())
        if count > PARAGRAPH:
            yield number, f"a paragraph of {count} words (at most {PARAGRAPH})"
        for sentence in re.split(r"(?<=[.!?])[\"')]*\s+", words):
            count, begin = len(sentence.split()), " ".join(sentence.split()[:6])
            if count > SENTENCE:
                yield number, f"a sentence of {count} words (at most {SENTENCE}): {begin} ..."


def main(names: list[str]) -> int:
    """Prints what is against the style. Returns the exit code."""
    files = [Path(n).resolve() for n in names] or [
        path for pattern in (*PAGES, *CODE) for path in sorted(ROOT.glob(pattern))
    ]
    words, count = banned(), 0
    for path in files:
        text = path.read_text()
        own = text.partition("### Words")[0] if path.name == "CONTRIBUTING.md" else text
        found = list(of_page(own)) if path.suffix == ".md" else []
        for number, line in enumerate(own.splitlines(), start=1):
            found += [(number, f"{match[0]!r}") for match in words.finditer(line)]
        for number, message in sorted(found):
            print(f"{path.relative_to(ROOT)}:{number}: {message}")
        count += len(found)
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
