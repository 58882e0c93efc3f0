"""The study of reliability: that its judge sees what is wrong, and a few cases of every part."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from studies.programs import Done
from studies.reliability import (
    __main__,
    damage,
    disk,
    divergence,
    endings,
    judge,
    kills,
    moments,
    report,
    stops,
    tiny,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """As `tiny.undisturbed` gives it, but trained once."""
    folder = tmp_path_factory.mktemp("whole")
    corpus, workdir = folder / "text.txt", folder / "run"
    corpus.write_text(tiny.TEXT)
    (running,) = tiny.start(corpus, workdir)
    assert running.end().returncode == 0
    return tiny.Whole(corpus, workdir, 1, cold=10.0, warm=5.0)


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole.workdir, tmp_path / "run")


def told(whole, run):
    return judge.differences(judge.read(whole.workdir), judge.read(run))


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# The judge ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_an_equal_run_is_equal(whole, copied):
    assert told(whole, copied) == []
    saved = judge.read(copied).checkpoints
    assert list(saved["latest"]) == [18, 20]
    assert saved["best"]
    assert not judge.unfinished(copied)


@pytest.mark.slow
def test_one_other_bit_of_any_array_is_seen(whole):
    there = judge.read_checkpoint(whole.workdir, "latest", tiny.TRAIN_STEPS)
    assert any("optimizer" in name for name in there.arrays)
    for name, array in there.arrays.items():
        other = bytearray(array.tobytes())
        other[0] ^= 1
        changed = np.frombuffer(bytes(other), array.dtype).reshape(array.shape)
        here = there._replace(arrays={**there.arrays, name: changed})
        assert judge.different(there, here) == [f"{name} differs"]
    zero = np.zeros(2, np.float32)
    assert not judge.same_bits(zero, -zero)
    assert not judge.same_bits(zero, zero.astype(np.int32))


@pytest.mark.parametrize(
    ("part", "changed"),
    [("place", {"next_sample": 8}), ("metrics", {"val/loss": 1.0}), ("arrays", {})],
)
@pytest.mark.slow
def test_another_place_loss_or_set_of_arrays_is_seen(whole, part, changed):
    there = judge.read_checkpoint(whole.workdir, "latest", tiny.TRAIN_STEPS)
    (difference,) = judge.different(there, there._replace(**{part: changed}))
    assert difference.startswith(part)


@pytest.mark.slow
def test_other_steps_of_checkpoints_are_seen(whole, copied):
    shutil.rmtree(copied / f"checkpoints/latest/{tiny.TRAIN_STEPS}")
    (difference,) = told(whole, copied)
    assert "latest checkpoints are of steps [18], not [18, 20]" in difference
    shutil.rmtree(copied / "checkpoints/best")
    assert any(difference.startswith("best") for difference in told(whole, copied))


@pytest.mark.slow
def test_other_metrics_are_seen_but_those_of_a_clock(whole, copied):
    path = copied / "metrics.jsonl"
    text = path.read_text()
    path.write_text(re.sub(r'"tokens_per_second": \d+', '"tokens_per_second": 7', text))
    assert told(whole, copied) == []
    edited(path, '"train/loss": 2.', '"train/loss": 3.')
    (difference,) = told(whole, copied)
    assert difference.startswith("metrics.jsonl: {'step': 1")
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert any("lines, not" in difference for difference in told(whole, copied))


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
    assert len(endings.wrong(end, codes)) == wrong


@pytest.mark.slow
def test_where_a_run_was_is_told_by_its_files(whole, tmp_path):
    assert moments.stage(tmp_path) == moments.BEFORE
    shutil.copy(whole.workdir / "config.json", tmp_path)
    assert moments.stage(tmp_path) == moments.STARTING
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0}\n{"step": 5, "val')
    assert moments.stage(tmp_path) == moments.EVALUATING
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "val/loss": 2.0}\n')
    assert moments.stage(tmp_path) == moments.BETWEEN
    (tmp_path / "checkpoints/latest/6.partial").mkdir(parents=True)
    assert moments.stage(tmp_path) == moments.SAVING


# The parts ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_does_not_end_as_the_other_is_counted_wrong(whole, copied):
    wanted = judge.read(whole.workdir)
    right = kills.Killed(copied, [moments.SAVING], [], [])
    assert kills.judged(wanted, right) == []
    altered = shutil.copytree(whole.workdir, copied)
    edited(altered / "metrics.jsonl", '"train/grad_norm": 0.', '"train/grad_norm": 1.')
    wrong = kills.judged(wanted, right)
    failed = kills.judged(wanted, right._replace(errors=["error: no\n"]))
    found = kills.counted([(right, []), (right, wrong), (right, failed)])
    assert found["equal"] == 1
    assert found["runs"] == found["kills"] == found["stages"][moments.SAVING] == 3
    assert [one["case"] for one in found["wrong"]] == [1, 2]


@pytest.mark.slow
def test_a_killed_run_whose_parameters_were_altered_is_found(whole, tmp_path, monkeypatch):
    """The end of a run is spoilt before it is judged."""
    end = endings.end

    def spoilt(running):
        done = end(running)
        divergence.spoil(tmp_path / "killed0", "params", newest_only=True)
        return done

    monkeypatch.setattr(kills.endings, "end", spoilt)
    killed = kills.kill(whole, tmp_path, 0, 0)
    wrong = kills.judged(judge.read(whole.workdir), killed)
    assert len(wrong) == 1
    assert wrong[0].startswith("latest/20: ['params']")


@pytest.mark.slow
def test_killed_runs():
    found = kills.run(2)
    assert found["equal"] == found["runs"] == 2, found["wrong"]
    assert found["kills"] > 0
    assert "**2 of 2**" in "".join(kills.lines(found))


@pytest.mark.slow
def test_stopped_runs():
    found = stops.run(1)
    assert len(found) == 4
    assert all(group["as_documented"] == group["runs"] == 1 for group in found.values()), found
    assert len(stops.lines(found)) == 2 + 2 + 4


@pytest.mark.slow
def test_numbers_that_are_not_finite(whole, tmp_path):
    workdir = tmp_path / "run"
    results = [
        divergence.few(whole, workdir, "gradient", 5, 2),
        divergence.endless(whole, workdir, "parameters", 7),
        divergence.saved(whole, workdir, "optimizer", newest_only=True),
    ]
    assert not [one for one in results if one.wrong]


def opened(step, value):
    return damage.Opened(step, {"kernel": np.float32(value), "place": {"next_sample": 8}})


@pytest.mark.parametrize(
    ("found", "said", "outcome"),
    [
        (opened(20, 2.0), "", damage.SILENT),
        (opened(20, 2.0), "latest/20 is damaged", damage.WHOLE),
        (opened(20, 2.5), "latest/20 is damaged", damage.WRONG),
        (opened(18, 1.0), "latest/20 is damaged", damage.FALL_BACK),
        (opened(18, 1.0), "", damage.UNSAID),
        (opened(18, 2.0), "latest/20 is damaged", damage.WRONG),
        (opened(17, 1.0), "latest/20 is damaged", damage.WRONG),
        (damage.UserError("latest/20 is damaged"), "", damage.ONE_LINE),
        (damage.UserError("two\nlines"), "", damage.TRACEBACK),
        (KeyError("kernel"), "", damage.TRACEBACK),
    ],
)
def test_what_is_read_of_a_damaged_checkpoint_is_judged(tmp_path, found, said, outcome):
    wanted = {18: opened(18, 1.0), 20: opened(20, 2.0)}

    def reader(copy):
        damage.logging.getLogger("absl").warning(said)
        if isinstance(found, Exception):
            raise found
        return found

    assert damage.judged(reader, tmp_path, wanted, "latest/20")[0] == outcome


def test_every_file_is_damaged_in_every_way(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/array").write_bytes(bytes(range(16)))
    (tmp_path / "empty").write_bytes(b"")
    cases = list(damage.damages(tmp_path, 40, np.random.default_rng(0)))
    of_array = [case for case in cases if case.file == "d/array"]
    assert {case.how for case in of_array} == set(damage.DAMAGES)
    assert len(of_array) == 4 + 40
    bits = [case.content for case in of_array if case.how == "one bit"]
    number = lambda content: int.from_bytes(content, "little")
    assert all((number(b) ^ number(bytes(range(16)))).bit_count() == 1 for b in bits)
    assert [case.how for case in cases if case.file == "empty"] == ["deleted"]


@pytest.mark.slow
def test_a_file_is_damaged_in_a_copy_only(whole):
    file = next(path for path in whole.workdir.glob("checkpoints/latest/20/params/d/*"))
    before = file.read_bytes()
    with damage.damaged_copy(whole.workdir, file.relative_to(whole.workdir), b"x") as copy:
        assert (copy / file.relative_to(whole.workdir)).read_bytes() == b"x"
    assert file.read_bytes() == before


@pytest.mark.slow
def test_damaged_checkpoints(whole, monkeypatch):
    monkeypatch.setattr(damage, "DAMAGES", {"one bit": damage.DAMAGES["one bit"]})
    random, outcomes = np.random.default_rng(0), set()
    for kind in judge.KINDS:
        outcomes |= {found for *_, found, _ in damage.outcomes(whole.workdir, kind, 1, random)}
    assert outcomes <= {damage.FALL_BACK, damage.ONE_LINE, damage.WHOLE}


def test_sizes_of_a_disk_begin_page_by_page():
    found = disk.sizes(10**6, 8)
    assert found[:2] == [0, disk.SC_PAGE]
    assert len(found) == 8
    assert found[-1] == 10**6


# The page -----------------------------------------------------------------------------------------


def test_the_page_has_every_part_with_figures_and_what_went_wrong():
    killed = kills.counted([(kills.Killed(Path(), [moments.SAVING], [], []), ["step differs"])])
    about = report.about("kills", 1, 0, 61.4)
    page = report.page({"kills": {"about": about, "figures": killed}}, __main__.modules())
    assert "## Killed and started again" in page
    assert "| in a save | 1 |" in page
    assert "`python -m studies.reliability --part=kills --cases=1 --seed=0`: 61 seconds" in page
    assert "Not as it should be, 1 in all" in page
    assert "step differs" in page
    assert json.loads(json.dumps(about)) == about
