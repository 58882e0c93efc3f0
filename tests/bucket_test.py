"""A run directory on a bucket, of a stand-in for Google Cloud Storage on this machine."""

import logging
import socket

import pytest
from train_helpers import config_in, values

from nrgpt_jax import disk, paths
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs import directory
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.training import loop

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no stand-in for a bucket")
pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra: gcs)")
pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.ci]


@pytest.fixture(scope="module")
def bucket():
    """The address of a bucket."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it says that there are no credentials
    with (
        emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("NO_GCE_CHECK", "true")  # no credentials are looked for
        yield "gs://bucket"


def test_a_run_is_resumed_and_opened(bucket, tmp_path):
    """The newest checkpoint is one whose save was killed: its checksums are not there yet."""
    config, workdir = config_in(tmp_path), paths.as_path(f"{bucket}/runs/a")
    config.update({"train_steps": 4, "eval_every": 4, "checkpoint_every": 2})
    loop.train(config, str(workdir))
    before = values(workdir)
    (workdir / "checkpoints/latest/4/checksums.json").unlink()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps("latest") == [2]
        assert checkpoints.steps("best") == [4]
    loop.train(config, str(workdir))
    assert values(workdir) == before
    assert any(name.startswith("tensorboard/") for name in paths.files(workdir))
    assert load_pretrained(str(workdir), "latest").config.train_steps == 4


def test_the_process_that_begins_last_may_train(bucket):
    workdir = paths.as_path(f"{bucket}/runs/locked")
    with directory.locked(workdir) as first:
        first.check()
        with directory.locked(workdir) as second:
            second.check()
            with pytest.raises(OSError, match="another process"):
                first.check()
        paths.remove(workdir)
        with pytest.raises(OSError, match="was removed"):
            second.check()


def test_a_checkpoint_that_is_set_aside_is_moved(bucket, tmp_path):
    for root in (paths.as_path(f"{bucket}/moved"), tmp_path):
        for name in ("a/x", "a/b/y"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            disk.write_whole(root / name, name.encode())
        paths.move(root / "a", root / "aside/a")
        assert paths.files(root) == ["aside/a/b/y", "aside/a/x"]
        assert (root / "aside/a/b/y").read_bytes() == b"a/b/y"


def test_a_place_that_cannot_be_written_is_named(bucket, tmp_path):
    config = config_in(tmp_path)
    with pytest.raises(UserError, match="gs://no-such-bucket/run cannot be written"):
        loop.train(config, f"{bucket.replace('bucket', 'no-such-bucket')}/run")
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
        loop.train(config, "s3://bucket/run")
    assert not list(tmp_path.glob("gs:*"))
