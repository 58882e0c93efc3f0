"""Tables of the pages in docs/."""

from collections.abc import Sequence

import numpy as np


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(values: Sequence[float], form: str = ".3f", unit: str = "") -> str:
    """Mean and standard deviation (of the sample) over seeds; of one value, that value."""
    known = np.array(values, float)
    known = known[np.isfinite(known)]
    if not len(known):
        return "none"
    mean = f"{known.mean():{form}}{unit}"
    return f"{mean} ± {known.std(ddof=1):{form}}{unit}" if len(known) > 1 else mean
