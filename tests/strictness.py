"""NRGPT_TEST_STRICT=1: a test that is skipped has failed, unless all that it lacks is a GPU."""

import os

import pytest

HARDWARE = ("GPU", "cuDNN")


def is_strict() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("NRGPT_TEST_STRICT", "0") not in ("", "0")


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes the report of a skip that of a failure, unless hardware is what it names as missing."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)
    path, line, reason = report.longrepr
    if not any(word in reason for word in HARDWARE):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: NRGPT_TEST_STRICT=1 allows no skips: {reason}"
