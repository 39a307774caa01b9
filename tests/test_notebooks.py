"""The notebooks run from top to bottom, as plain Python, on the default model.

On its first layers: a step of all thirty compiles for 15 s, which says no more of a
notebook. The README's code runs the whole model (tests/test_repo.py).
"""

import importlib.util
import json
import pathlib
import warnings

import matplotlib.pyplot
import pytest

import sparsespec_jax
from tests.engine_helpers import first_layers

NUM_LAYERS = 4

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

_SPEC = importlib.util.spec_from_file_location(
    "fill_notebooks", ROOT / "tools" / "fill_notebooks.py"
)
fill_notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fill_notebooks)


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
def test_notebooks_are_stored_with_what_they_show(path):
    """Of the code that is there, and small enough to be shown on a page."""
    notebook = json.loads(path.read_text())
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert notebook["metadata"]["code"] == fill_notebooks.hash_of_code(notebook), (
        f"run it again: python tools/fill_notebooks.py notebooks/{path.name}"
    )
    cells = fill_notebooks.code_cells(notebook)
    assert len(cells) == len(code_cells(path)) - 1  # the one that installs
    shown = sum(bool(cell["outputs"]) for cell in cells)
    assert shown and path.stat().st_size < 200_000
    assert "/tmp" not in path.read_text() and "/home" not in path.read_text()


def test_cells_are_filled_with_texts_and_pictures(tmp_path):
    cells = ["x = 2", "print(x + 1)", "from matplotlib import pyplot\npyplot.plot([x])"]
    notebook = {
        "metadata": {},
        "cells": [{"cell_type": "code", "source": [cell]} for cell in cells],
    }
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(notebook))
    matplotlib.use("Agg")
    fill_notebooks.fill(path)
    filled = json.loads(path.read_text())
    outputs = [cell["outputs"] for cell in filled["cells"]]
    assert outputs[0] == [] and outputs[1][0]["text"] == ["3\n"]
    assert outputs[2][0]["data"]["image/png"].startswith("iVBOR")
    assert filled["metadata"]["code"] == fill_notebooks.hash_of_code(notebook)
    filled["cells"][0]["source"] = ["x = 3"]
    assert filled["metadata"]["code"] != fill_notebooks.hash_of_code(filled)


def test_there_are_three():
    assert len(NOTEBOOKS) == 3
