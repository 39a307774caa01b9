"""The notebooks run from top to bottom, as plain Python, on the default model.

On its first layers: a step of all thirty compiles for 15 s, which says no more of a
notebook. The README's code runs the whole model (tests/test_repo.py).
"""

import json
import pathlib
import warnings

import matplotlib.pyplot
import pytest

import sparsespec_jax
from tests.engine_helpers import first_layers

NUM_LAYERS = 4

NOTEBOOKS = sorted(
    (pathlib.Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb")
)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.fixture
def fewer_layers(monkeypatch):
    """`load_model` gives the first layers of the model that it is asked for."""
    load_model = sparsespec_jax.load_model

    def load(*args, **options):
        return first_layers(load_model(*args, **options), NUM_LAYERS)

    monkeypatch.setattr(sparsespec_jax, "load_model", load)


@pytest.mark.usefixtures("fewer_layers")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    matplotlib.use("Agg")
    install, *cells = code_cells(path)
    assert "%pip install" in install and "import sparsespec_jax" in install
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # plotting libraries deprecate at will
        for cell in cells:
            exec(compile(cell, path.name, "exec"), names)
    matplotlib.pyplot.close("all")
    printed = capsys.readouterr().out
    assert "accepted" in printed or "recall" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_output(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert not any(cell.get("outputs") for cell in cells)


def test_there_are_three():
    assert len(NOTEBOOKS) == 3
