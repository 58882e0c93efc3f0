"""What a run writes of itself: only what is so, whole or not at all."""

import json
import shutil
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from train_helpers import TEXT, config_of, values

import nrgpt_jax
from nrgpt_jax import disk
from nrgpt_jax.config_record import RENAMED, renamed
from nrgpt_jax.configs import default_config, field_names
from nrgpt_jax.datasets.tokenizers import CharTokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs import directory as runs
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.metrics import MetricWriter, read_metrics
from nrgpt_jax.sample import sample
from nrgpt_jax.training import loop
from studies.programs import program

pytestmark = pytest.mark.usefixtures("standard_promotion")

OLD_RUN = Path(__file__).parent / "run_format_1.zip"
BEFORE_RENAMES = Path(__file__).parent / "run_before_renames.zip"


def writer_of(workdir, start=0, mark=None):
    return MetricWriter(workdir, start, {}, False, mark)


def lines_of(workdir):
    return [(r["step"], r["loss"]) for r in read_metrics(workdir)]


def written(workdir):
    """A file with lines of steps 1 to 3, and the mark of a checkpoint made after step 2."""
    writer = writer_of(workdir)
    writer.open()
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    mark = writer.mark()
    writer.write(3, {"loss": float("nan")})
    writer.close()
    return mark


def test_lines_after_the_checkpoint_are_dropped_when_it_is_opened(tmp_path):
    mark = written(tmp_path)
    assert lines_of(tmp_path) == [(1, 1.0), (2, 2.0), (3, None)]
    again = writer_of(tmp_path, 2, mark)
    assert len(lines_of(tmp_path)) == 3, "nothing is touched before"
    again.open()
    again.write(3, {"loss": 3.5})
    assert lines_of(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.5)]


def test_a_line_of_the_same_step_that_the_checkpoint_did_not_know_is_dropped_too(tmp_path):
    mark = written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.0}\n')
    again = writer_of(tmp_path, 2, mark)
    again.open()
    again.write(3, {"loss": 3.5})
    assert lines_of(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.5)]


@pytest.mark.parametrize(
    "damage", [b'{"step": 1, "loss": 7.0}\n', b"\xff\xfe\n", b"[" * 10**5 + b"\n", b"{}\n", b"\n"]
)
def test_a_foreign_line_stops_nothing(tmp_path, caplog, damage):
    mark = written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(damage + b"".join(lines[1:]))
    before = path.read_bytes()
    again = writer_of(tmp_path, 2, mark)
    again.open()
    again.write(3, {"loss": 3.5})
    assert lines_of(tmp_path)[-2:] == [(2, 2.0), (3, 3.5)]
    assert "is not the file that the checkpoint at step 2 knew" in caplog.text
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before, "nothing is lost"


def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path, monkeypatch, caplog):
    writer = writer_of(tmp_path)
    writer.open()
    writer.write(1, {"loss": 1.0})
    path_open = Path.open

    def full(path, *args, **kwargs):
        if path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device", str(path))
        return path_open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        writer.write(2, {"loss": 2.0})
        with pytest.raises(OSError, match="No space"):
            writer.mark()
    assert "cannot be written now" in caplog.text
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("x" * 1000)  # as of a line that was written in part
    writer.write(3, {"loss": 3.0})
    assert lines_of(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "x" not in (tmp_path / "metrics.jsonl").read_text()


def test_what_a_killed_training_was_writing_is_removed_and_an_evaluations_file_stays(tmp_path):
    for name in ("config.json", "config.json.partial-12345678", "evaluation.json.partial-12345678"):
        (tmp_path / name).touch()
    with runs.locked(tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "evaluation.json.partial-12345678", "lock"}


@pytest.mark.parametrize("content", [b"", b"x", b"123456"])
def test_a_file_is_written_whole_and_only_when_it_differs(tmp_path, monkeypatch, content):
    path = tmp_path / "file"
    disk.write_whole(path, content)
    number = path.stat().st_ino
    disk.write_whole(path, content)
    assert path.stat().st_ino == number
    monkeypatch.setattr(disk.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        disk.write_whole(path, content + b"more")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_json_says_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "x.json"
    disk.write_json(path, {"steps": 3})
    assert disk.read_json(path, dict[str, int], "") == {"steps": 3}
    path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(UserError, match=r'x\.json does not match .* remove its line "checksum"'):
        disk.read_json(path, dict[str, int], "restore it")
    for content, reason in (
        ('{"steps": 3', "truncated"),
        ('{"steps": "3"}', r"Expected `int`, got `str` - at `\$"),
        ("[" * 10**5, "recursion"),
        ('{"steps": NaN}', "malformed"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"x\.json cannot be read .*{reason}.*restore it"):
            disk.read_json(path, dict[str, int], "restore it")


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT)
    return config_of(corpus)


@pytest.mark.ci
def test_an_older_run_is_read_and_gone_on_with(config, tmp_path, caplog):
    """Of version 0.2 before checkpoints had checksums."""
    with zipfile.ZipFile(OLD_RUN) as archive:
        archive.extractall(tmp_path)
    workdir = tmp_path / "run"
    before, path = values(workdir), config.data.path
    config = runs.load_config(workdir)
    assert config.train_steps == 12
    config.update({"train_steps": 14})
    config.data.path = path
    loop.train(config, workdir)
    assert values(workdir)[: len(before)] == before
    assert caplog.text.count("has no checksums") == 1
    record = json.loads((workdir / "config.json").read_text())["record"]
    assert record["format"] == runs.FORMAT == 2
    assert record["history"][-1]["since_step"] == 12
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.best_loss() < 3.0


@pytest.fixture
def before_renames(tmp_path):
    """The directory of `rest:listops_sphere_decay_held`, small, of two steps."""
    with zipfile.ZipFile(BEFORE_RENAMES) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "run"


def test_a_run_from_before_fields_were_renamed_is_read(before_renames):
    before = json.loads((before_renames / "config.json").read_text())
    config = runs.load_config(before_renames)
    for old, new in RENAMED.items():
        (group, name), (_, now) = old.split("."), new.split(".")
        assert config[group][now] == before[group][name]
    assert renamed({"model": {"kernels": "plain"}}) == {"model": {"implementation": "autodiff"}}
    text = sample(before_renames, "add_10,(,3,4,),=", max_new_tokens=6)
    assert text == ["add_10,(,3,4,),=,0,7,7,min_10,0,1"], "as it was then"


@pytest.mark.slow
def test_a_run_from_before_fields_were_renamed_is_resumed(before_renames):
    config = runs.load_config(before_renames)
    config.train_steps = 3
    loop.train(config, before_renames)
    assert read_metrics(before_renames)[-1]["step"] == 3
    record = json.loads((before_renames / "config.json").read_text())["record"]
    changes = record["history"][-1]["changes"]
    assert [change.split("=")[0] for change in changes] == ["train_steps"]


def test_a_renamed_field_on_the_command_line_is_named():
    done = program(
        "train", "--config=experiments/listops.py", "--config.model.rate=psd", "--workdir=x"
    )
    assert done.returncode == 2
    assert "--config.model.inference_rate" in done.stderr


def test_a_clone_that_is_not_installed_records_its_version(config, tmp_path, monkeypatch):
    def version(name):
        if name == "nrgpt-jax":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(runs.metadata, "version", version)
    runs.record_run(tmp_path, config, CharTokenizer(("a", "b")))
    versions = json.loads((tmp_path / "config.json").read_text())["record"]["versions"]
    assert versions["nrgpt-jax"] == nrgpt_jax.__version__
    assert versions["jax"] == "1.2.3"


def test_a_newer_run_says_so(tmp_path):
    with zipfile.ZipFile(OLD_RUN) as archive:
        archive.extract("run/config.json", tmp_path)
    path = tmp_path / "run/config.json"
    disk.write_json(path, {**json.loads(path.read_text()), "record": {"format": 3}, "new": 1})
    with pytest.raises(UserError, match="newer version"):
        runs.load_config(tmp_path / "run")


def test_nothing_is_recorded_before_a_step_is_made(config, tmp_path, monkeypatch):
    config.train_steps = 4
    workdir = tmp_path / "run"
    loop.train(config, workdir)
    kept = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    config.optimizer.learning_rate = 0.5
    loop.train(config, workdir)  # nothing is left to do
    config.train_steps = 8
    monkeypatch.setattr(loop.Trainer, "_loop", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, workdir)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == kept


def test_a_run_directory_that_is_removed_is_an_error(config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    evaluate = loop.Trainer._evaluate

    def remove(trainer, step, bar):
        evaluate(trainer, step, bar)
        if step == 6:
            shutil.rmtree(workdir)

    monkeypatch.setattr(loop.Trainer, "_evaluate", remove)
    with pytest.raises(OSError, match="removed or replaced"):
        loop.train(config, workdir)
    assert not (workdir / "checkpoints").exists()


def test_what_may_change_half_way_are_fields():
    assert set(runs.FREE) <= set(field_names(default_config()))
