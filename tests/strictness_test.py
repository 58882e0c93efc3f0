"""Under NRGPT_TEST_STRICT=1 only what needs a GPU may be skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import strictness

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
    "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error",
    "no skips: Skipped: needs chromium",
    ": needs a GPU and JAX_PLATFORMS=cuda",
)
LENIENT = ("1 passed, 3 skipped, 1 xfailed",)


@pytest.mark.parametrize(("value", "seen"), [("1", STRICT), ("0", LENIENT), (None, LENIENT)])
def test_skips_of_tests_and_of_modules(tmp_path, value, seen):
    (tmp_path / "skipping_test.py").write_text(SKIPPING)
    (tmp_path / "lacking_test.py").write_text(LACKING)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = *_test.py\n")
    environment = {n: v for n, v in os.environ.items() if n != "NRGPT_TEST_STRICT"}
    environment |= {"NRGPT_TEST_STRICT": value} if value is not None else {}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "-p", "strictness", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-rs"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if value == "1" else 0), done.stdout
    for text in seen:
        assert text in done.stdout


def test_these_tests_are_judged_so(request):
    plugins = request.config.pluginmanager.get_plugins()
    for hook in ("pytest_runtest_makereport", "pytest_make_collect_report"):
        assert getattr(strictness, hook) in [getattr(plugin, hook, None) for plugin in plugins]
