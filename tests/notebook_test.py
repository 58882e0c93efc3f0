"""The notebook in docs/ runs from top to bottom, and says what its text says."""

import warnings
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/landscape.ipynb"


@pytest.mark.slow
def test_it_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own parts
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        where = {"metadata": {"path": str(NOTEBOOK.parents[1])}}
        NotebookClient(notebook, timeout=400, kernel_name="python3", resources=where).execute()
    printed = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    (promised,) = (text for text in printed if text.startswith("Proposition 2.1 -"))
    assert "end higher: 0%" in promised
    (broken,) = (text for text in printed if text.startswith("Proposition None -"))
    assert "end higher: 0%" not in broken
    assert any("guaranteed by Proposition 2.1" in text for text in printed)
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 5
