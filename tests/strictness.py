"""NRGPT_TEST_STRICT=1: a test that is skipped has failed, unless what it lacks cannot be installed
beside the rest: a GPU, or SkyPilot, which asks for older packages."""

import os

import pytest

ELSEWHERE = ("GPU", "cuDNN", "SkyPilot")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Of a test."""
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """Of a module, which may be skipped as a whole."""
    return _judged((yield))


def _judged(report: pytest.TestReport | pytest.CollectReport):
    """The report; that of a skip as of a failure, unless it lacks what is elsewhere."""
    strict = os.environ.get("NRGPT_TEST_STRICT", "0") not in ("", "0")
    if not strict or not report.skipped or hasattr(report, "wasxfail"):
        return report
    assert isinstance(report.longrepr, tuple)
    path, line, reason = report.longrepr
    if not any(word in reason for word in ELSEWHERE):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: NRGPT_TEST_STRICT=1 allows no skips: {reason}"
    return report
