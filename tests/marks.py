"""Which of a family of tests are quick: what the others hold too is slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any):
    """Parameters of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(quick: Collection, values: Iterable) -> list:
    """Single parameters, slow but for some."""
    return [value if value in quick else slow(value) for value in values]
