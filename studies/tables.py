"""Tables of the pages in docs/."""

from collections.abc import Sequence

import numpy as np

from nrgpt_jax.cli import percent


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation (of the sample) over seeds.

    Values that are not finite are left out, and how many are left is said.

    Args:
      values: one a seed; shares where `form` ends in %.
      form: of Python's format language, with a number of digits: `.3f`, `.1%`.
    """
    known = np.array(values, float)  # None is not a number
    known = known[np.isfinite(known)]
    if not len(known):
        return "none"
    share = form.endswith("%")
    write = lambda x: percent(x, int(form[1:-1])) if share else f"{x:{form}}"
    text = write(known.mean())
    if len(known) > 1:
        text += f" ± {write(known.std(ddof=1))}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"
