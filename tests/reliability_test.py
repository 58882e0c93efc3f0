"""The study of reliability: that its judges see what is wrong, and a few cases of every part."""

import functools
import logging
import re

import numpy as np
import pytest

from nrgpt_jax.errors import UserError
from studies.programs import Done
from studies.reliability import __main__ as study
from studies.reliability import (
    attempts,
    commands,
    contents,
    damage,
    disk,
    divergence,
    judge,
    moments,
    report,
    runs,
    signals,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """As `runs.undisturbed` gives it, but trained once."""
    folder = tmp_path_factory.mktemp("whole")
    found = runs.Whole(folder / "text.txt", folder / "run", 1, cold=10.0, warm=5.0)
    found.corpus.write_text(runs.TEXT)
    (running,) = found.start(found.workdir)
    assert running.end().returncode == 0
    return found


def edit(path, old, new):
    path.write_text(re.sub(old, new, path.read_text(), count=1))


# The judges ---------------------------------------------------------------------------------------


RUN: judge.Run = {
    ("metrics.jsonl", 1, ""): {"step": 1, "train/loss": 2.0},
    ("latest", 18, "kernel"): judge.bits(np.ones(2, np.float32)),
    ("latest", 20, "kernel"): judge.bits(np.zeros(2, np.float32)),
    ("latest", 20, "place"): {"next_sample": 8},
    ("best", 20, "kernel"): judge.bits(np.zeros(2, np.float32)),
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("metrics.jsonl", 1, ""), {"step": 1, "train/loss": 3.0}),
        (("metrics.jsonl", 1, ""), None),
        (("metrics.jsonl", 2, ""), {"step": 2}),
        (("latest", 18, "kernel"), judge.bits(np.zeros(2, np.float32))),
        (("latest", 20, "kernel"), judge.bits(-np.zeros(2, np.float32))),
        (("latest", 20, "kernel"), judge.bits(np.zeros(2, np.int32))),
        (("latest", 20, "kernel"), judge.bits(np.zeros((1, 2), np.float32))),
        (("latest", 20, "place"), {"next_sample": 16}),
        (("latest", 23, "kernel"), {}),
        (("best", 20, "kernel"), None),
    ],
)
def test_whatever_differs_is_seen(key, value):
    other = {name: v for name, v in {**RUN, key: value}.items() if v is not None}
    for all_steps in (True, False):
        (difference,) = judge.differences(RUN, other, all_steps=all_steps)
        assert difference.startswith(f"{key[0]}/{key[1]}")
        assert judge.differences(other, RUN, all_steps=True)


def test_only_older_checkpoints_may_be_others():
    other = {key: value for key, value in RUN.items() if key[1] != 18}
    other["latest", 19, "kernel"] = {}
    assert len(judge.differences(RUN, other)) == 2
    assert judge.differences(RUN, other, all_steps=False) == []


@pytest.mark.long
@pytest.mark.slow
def test_all_of_a_run_is_read_but_what_a_clock_decides(whole, tmp_path):
    wanted = judge.read(whole.workdir)
    names = [name for kind, step, name in wanted if (kind, step) == ("latest", 20)]
    assert any("params" in name for name in names)
    assert any("optimizer" in name for name in names)
    assert {step for kind, step, _ in wanted if kind == "latest"} == {18, 20}
    assert any(kind == "best" for kind, *_ in wanted)
    assert not judge.unfinished(whole.workdir)
    with damage.copied(whole.workdir) as copy:
        text = (copy / "metrics.jsonl").read_bytes()
        damage.write(copy / "metrics.jsonl", text)
        edit(copy / "metrics.jsonl", r'"tokens_per_second": \d', '"tokens_per_second": 7')
        assert (copy / "metrics.jsonl").read_bytes() != text
        assert judge.differences(wanted, judge.read(copy)) == []


@pytest.mark.parametrize(
    ("end", "codes", "wrong"),
    [
        (Done(1, "", "error: no space\n"), {1}, 0),
        (Done(-15, "", ""), {143}, 0),
        (Done(0, "", ""), {143}, 1),
        (Done(1, "", "error: no space\nerror: no space\n"), {1}, 1),
        (Done(1, "", "no space\n"), {1}, 1),
        (Done(2, "", "Traceback (most recent call last)\nerror: no\n"), {2}, 1),
        (Done(0, "", "error: but it goes on\n"), {0}, 1),
    ],
)
def test_an_end_that_is_not_as_documented_is_wrong(end, codes, wrong):
    assert len(runs.wrong_end(end, codes)) == wrong


def test_where_a_run_was_is_seen_by_its_files(tmp_path):
    assert moments.stage(tmp_path) == "starting"
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0}\n{"step": 5, "val')
    assert moments.stage(tmp_path) == "in an evaluation"
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "val/loss": 2.0}\n')
    assert moments.stage(tmp_path) == "in between"
    (tmp_path / "checkpoints/latest/6.partial").mkdir(parents=True)
    assert moments.stage(tmp_path) == "in a save"


NEWEST, OLDER = {"kernel": 2.0}, {"kernel": 1.0}


@pytest.mark.parametrize(
    ("found", "said", "outcome"),
    [
        (NEWEST, "", "fine"),
        (NEWEST, "latest/20 is damaged", "warning"),
        ({"kernel": 2.5}, "latest/20 is damaged", "silent"),
        (OLDER, "latest/20 is damaged", "older, with a warning"),
        (OLDER, "", "silent"),
        (UserError("latest/20 is damaged"), "", "one line"),
        (UserError("two\nlines"), "", "traceback"),
        (KeyError("kernel"), "", "traceback"),
    ],
)
def test_what_is_read_of_a_damaged_checkpoint_is_judged(tmp_path, found, said, outcome):
    def reader(copy):
        logging.getLogger("absl").warning(said)
        if isinstance(found, Exception):
            raise found
        return found

    attempt = functools.partial(damage.opened, reader, tmp_path, NEWEST, OLDER, "latest/20")
    assert attempts.judged(attempt)[0] == outcome


# The parts ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_that_were_disturbed_end_as_the_other_and_one_that_does_not_is_noticed(whole):
    def alter(workdir, done):
        edit(workdir / "metrics.jsonl", '"train/grad_norm": 0.', '"train/grad_norm": 1.')
        return []

    altered = runs.Case("altered", [runs.RESUMED._replace(check=alter)])
    shorter = runs.Case("shorter", [runs.RESUMED._replace(fields={"train_steps": 9})])
    cases = [altered, shorter, *signals.killed(whole, 2, 0), next(divergence.saved(whole))]
    cases += [divergence.few("gradient", 5, 2), divergence.endless("parameters", 7)]
    found = runs.counted(runs.run_all(whole, cases))
    good = {name: row["as documented"] for name, row in found["rows"].items()}
    assert good.pop("altered") == good.pop("shorter") == "0 of 1"
    assert all(text.split()[0] == text.split()[2] for text in good.values()), found["wrong"]
    assert len(found["wrong"]) == 2


@pytest.mark.slow
def test_stopped_runs():
    found = signals.run_stops(1, 0, 1)
    assert not found["wrong"]
    assert [row["as documented"] for row in found["rows"].values()] == ["1 of 1"] * 4


def test_every_file_is_damaged_in_every_way_in_a_copy_only(tmp_path):
    content = bytes(range(16))
    (tmp_path / "run/d").mkdir(parents=True)
    (tmp_path / "run/d/array").write_bytes(content)
    (tmp_path / "run/empty").write_bytes(b"")
    cases = list(damage.damages(tmp_path / "run", 40, np.random.default_rng(0)))
    ways = [how for file, how, _ in cases if file.name == "array"]
    assert set(ways) == set(damage.DAMAGES)
    assert len(ways) == 4 + 40
    number = lambda content: int.from_bytes(content, "little")
    flipped = [number(c) ^ number(content) for _, how, c in cases if how == "one bit"]
    assert {bits.bit_count() for bits in flipped} == {1}
    assert [how for file, how, _ in cases if file.name == "empty"] == ["deleted"]
    with damage.copied(tmp_path / "run") as copy:
        damage.write(copy / "d/array", b"x")
        damage.write(copy / "empty", None)
        assert [path.name for path in copy.iterdir()] == ["d"]
    assert (tmp_path / "run/d/array").read_bytes() == content
    assert (tmp_path / "run/empty").exists()


@pytest.mark.slow
def test_damaged_checkpoints(whole, monkeypatch):
    monkeypatch.setattr(damage, "DAMAGES", {"one bit": damage.DAMAGES["one bit"]})
    random = np.random.default_rng(0)
    of_kind = lambda kind: damage.try_all(kind, whole.workdir, kind, 1, random)
    found = attempts.counted(outcome for kind in judge.KINDS for outcome in of_kind(kind))
    assert not found["wrong"]
    assert all(row["older, with a warning"] > 5 for row in found["rows"].values())


def test_sizes_of_a_disk_begin_page_by_page(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10**6))
    found = disk.sizes(tmp_path, 8)
    assert found[0] == 0
    assert 0 < found[1] <= 2**16
    assert len(found) == 8
    assert found[-1] > 10**6


@pytest.mark.ci
@pytest.mark.parametrize("file", contents.FILES)
def test_contents_of_files(file):
    found = contents.run(cases=60, seed=0, files=(file,))
    assert not found["wrong"]
    (row,) = found["rows"].values()
    assert row["fine"] + row["warning"] > 0, "what is as it was opens"
    assert row["one line"] > 10 or file == contents.METRICS_FILE, "whose lines are left out"


def test_command_lines():
    found = commands.run(cases=120, seed=0)
    assert not found["wrong"]
    for outcome in ("one line", "fine"):
        assert sum(row[outcome] for row in found["rows"].values()) > 10


def test_the_page_has_every_part_with_figures_and_what_went_wrong():
    results = [runs.Result("SIGKILL", ["in a save"], [0.0], ["step differs"])]
    about = report.about("kills", 1, 0, 61.4)
    page = report.page({"kills": {"about": about, "figures": runs.counted(results)}}, study.PARTS)
    assert "## Killed and restarted" in page
    assert "| SIGKILL | 0 of 1 | 1 |" in page
    assert "`python -m studies.reliability --part=kills --cases=1 --seed=0`: 61 seconds" in page
    assert "Not as documented, 1 in all" in page
    assert "step differs" in page
