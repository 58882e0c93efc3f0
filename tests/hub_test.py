"""Models on the hub: what is uploaded opens again, and refusals are one line."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from pages_helpers import save_tiny

from nrgpt_jax.errors import UserError
from nrgpt_jax.runs import hub
from nrgpt_jax.runs.pretrained import load_pretrained


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A hub in a folder."""
    created = {}

    def create_repo(name, private, exist_ok):
        created[name] = private

    def upload_folder(repo_id, folder_path):
        if repo_id not in created:
            raise RuntimeError("404\nno such repository")
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(name, local_dir):
        if name not in created:
            raise RuntimeError("404\nno such repository")
        if local_dir is None:
            return str(tmp_path / "hub" / name)
        shutil.copytree(tmp_path / "hub" / name, local_dir)
        return str(local_dir)

    functions = (create_repo, upload_folder, snapshot_download)
    library = SimpleNamespace(**{function.__name__: function for function in functions})
    monkeypatch.setattr(hub, "_hub", lambda: library)
    return created


def test_a_model_goes_there_and_back(shelf, tmp_path):
    save_tiny(tmp_path / "run")
    hub.push(tmp_path / "run", "me/tiny")
    assert shelf == {"me/tiny": True}
    card = (tmp_path / "hub/me/tiny/README.md").read_text()
    assert card.startswith("---\nlibrary_name: nrgpt-jax\n")
    first, second = load_pretrained(tmp_path / "run"), load_pretrained("hf://me/tiny")
    count = sum(leaf.size for leaf in jax.tree.leaves(first.variables))
    assert f"| parameters | {count:,} |" in card
    jax.tree.map(np.testing.assert_array_equal, first.variables, second.variables)
    assert load_pretrained(hub.pull("me/tiny", tmp_path / "copy")).model == first.model
    with pytest.raises(UserError, match="not empty"):
        hub.pull("me/tiny", tmp_path / "run")


def test_a_refusal_is_one_line(shelf):
    with pytest.raises(UserError, match="404 no such repository"):
        load_pretrained("hf://me/nothing")
