"""Tables of the pages in docs/."""

from collections.abc import Sequence

import numpy as np


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(values: Sequence[float], form: str = ".3f", unit: str = "") -> str:
    """Mean and standard deviation (of the sample) over seeds.

    Values that are not finite are left out, and how many are left is said.
    """
    known = np.array(values, float)
    known = known[np.isfinite(known)]
    if not len(known):
        return "none"
    text = f"{known.mean():{form}}{unit}"
    if len(known) > 1:
        text += f" ± {known.std(ddof=1):{form}}{unit}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"
