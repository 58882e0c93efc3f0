"""Under NRGPT_TEST_STRICT=1 only what needs a GPU may be skipped."""

import pytest
import strictness


def judged(outcome="skipped", reason="Skipped: needs chromium", **fields):
    """A report of one test, as it is passed on under NRGPT_TEST_STRICT=1."""
    where = ("some_test.py", 3, reason)
    report = pytest.TestReport("some_test.py::test", ("", 0, ""), {}, outcome, where, "call")
    vars(report).update(fields)
    strictness.fail_if_skipped(report)
    return report


def test_a_skip_has_failed_and_says_why():
    found = judged()
    assert found.failed
    assert "some_test.py:3: NRGPT_TEST_STRICT=1" in str(found.longrepr)
    assert "needs chromium" in str(found.longrepr)


@pytest.mark.parametrize("reason", ["needs a GPU and JAX_PLATFORMS=cuda", "needs cuDNN"])
def test_what_needs_other_hardware_may_be_skipped(reason):
    assert judged(reason=reason).skipped


def test_expected_failures_and_results_stay_what_they_are():
    assert judged(wasxfail="known").skipped
    assert judged("passed").passed
    assert judged("failed").failed


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_it_is_chosen_by_the_environment(monkeypatch, value, expected):
    monkeypatch.delenv("NRGPT_TEST_STRICT", raising=False)
    if value is not None:
        monkeypatch.setenv("NRGPT_TEST_STRICT", value)
    assert strictness.is_strict() == expected
