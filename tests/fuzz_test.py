"""Random contents of files and random command lines: fine, or one line; `studies.reliability` has
the same at larger numbers."""

import pytest

from studies.reliability import commands, contents


@pytest.mark.parametrize("file", contents.FILES)
def test_contents_of_files(file):
    found = contents.run(cases=60, seed=0, file=file)
    assert not found["wrong"]
    assert found["fine"] + found["warning"] > 0, "what is as it was opens"
    assert found["one line"] > 10 or file == contents.METRICS_FILE, "whose lines are left out"


def test_command_lines():
    found = commands.run(cases=120, seed=0)
    assert not found["wrong"]
    assert found["one line"] > 10
    assert found["fine"] > 10
