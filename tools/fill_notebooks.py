"""Runs notebooks as plain Python and stores what their cells show in them.

    python tools/fill_notebooks.py notebooks/*.ipynb

Printed text is stored, and figures as small PNGs, so that a page that shows notebooks
has something to show. The hash of the code goes into the notebook's metadata: a test
says when the code has changed since.
"""

import base64
import contextlib
import hashlib
import io
import json
import pathlib
import sys
import warnings

_DPI = 80


def code_cells(notebook):
    """The code cells of a notebook, the one that installs left out."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    return [cell for cell in cells if "%pip install" not in "".join(cell["source"])]


def hash_of_code(notebook):
    """What the outputs follow from, the machine aside."""
    code = ["".join(cell["source"]) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def fill(path):
    """Run one notebook and write it with its outputs."""
    from matplotlib import pyplot

    notebook, names = json.loads(path.read_text(encoding="utf-8")), {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        code = compile("".join(cell["source"]), f"{path.name}:{number}", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        outputs = [_text(printed.getvalue())] if printed.getvalue() else []
        outputs += [_picture(pyplot.figure(n)) for n in pyplot.get_fignums()]
        pyplot.close("all")
        cell["outputs"], cell["execution_count"] = outputs, number
    notebook["metadata"]["code"] = hash_of_code(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _text(text):
    lines = text.splitlines(keepends=True)
    return {"name": "stdout", "output_type": "stream", "text": lines}


def _picture(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, bbox_inches="tight", format="png")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def main(paths):
    """Fill every notebook named."""
    import matplotlib

    matplotlib.use("Agg")
    warnings.simplefilter("ignore")
    for path in map(pathlib.Path, paths):
        fill(path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
