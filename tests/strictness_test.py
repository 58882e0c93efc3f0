"""Under NRGPT_TEST_STRICT=1 only what needs a GPU may be skipped."""

import pytest
import strictness

pytest_plugins = ["pytester"]

SKIPPING = """
import pytest

def test_without_chromium():
    pytest.skip("needs chromium")

@pytest.mark.skipif(True, reason="needs a GPU and JAX_PLATFORMS=cuda")
def test_without_a_gpu():
    pass

@pytest.mark.xfail(reason="known")
def test_expected_to_fail():
    assert False

def test_passes():
    pass
"""
LACKING = """
import pytest

pytest.importorskip("a_package_that_nobody_has")
"""


STRICT = (
    {"failed": 1, "passed": 1, "skipped": 1, "xfailed": 1, "errors": 1},
    ["*no skips: Skipped: needs chromium", "*: needs a GPU and JAX_PLATFORMS=cuda"],
)
LENIENT: tuple = {"passed": 1, "skipped": 3, "xfailed": 1}, []


@pytest.mark.parametrize(("value", "outcomes", "lines"), [("1", *STRICT), ("0", *LENIENT)])
def test_skips_of_tests_and_of_modules(pytester, monkeypatch, value, outcomes, lines):
    monkeypatch.setenv("NRGPT_TEST_STRICT", value)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(test_skipping=SKIPPING, test_lacking=LACKING)
    options = "-p", "strictness", "-p", "no:cacheprovider", "--continue-on-collection-errors"
    done = pytester.runpytest(*options, "-rs")
    done.assert_outcomes(**outcomes)
    for line in lines:
        done.stdout.fnmatch_lines([line])


def test_these_tests_are_judged_so(request):
    plugins = request.config.pluginmanager.get_plugins()
    for hook in ("pytest_runtest_makereport", "pytest_make_collect_report"):
        assert getattr(strictness, hook) in [getattr(plugin, hook, None) for plugin in plugins]
