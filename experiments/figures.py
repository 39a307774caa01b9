"""Figures of runs: one PNG and one SVG in every complete run directory.

    python -m experiments.figures --results experiments/results

Needs the extra `plots`. Each experiment draws its own (`Experiment.figure`), all in one
style (`experiments.drawing`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

from experiments import (
    drawing,
    evidence,
    experiment,
    launch,
    reader,
    record,
    signals,
)
from experiments.options import Options, option
from experiments.study_config import as_json, as_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiguresConfig(Options):
    """Where the runs are."""

    results: str = option("experiments/results", "Folder of run directories.")


def drawable(results):
    """[(run directory, its Experiment)] below `results` that are complete."""
    found = []
    for path in sorted(pathlib.Path(results).glob("**/results.jsonl")):
        run = reader.read(path.parent)
        kind = run.experiment and experiment.of_module(run.experiment)
        if kind and kind.figure and run.is_complete:
            found.append((path.parent, kind))
    return found


def study_lines(axes, summary, records):
    """A study: it names its axes, and a row's interval is its error bar."""
    rows = [as_json(as_row(found)) for found in records]
    x, series = summary["x"], summary["series"]
    figures = [found.get(summary["y"]) for found in records]
    names = {summary["y"] if figure else "expected_accepted" for figure in figures}
    figures = [
        drawing.interval_of(figure or found["expected_accepted"])
        for figure, found in zip(figures, records, strict=True)
    ]
    y = " / ".join(drawing.axis(name) for name in sorted(names))
    drafts = {row["num_draft_tokens"] for row in rows}
    if len(drafts) == 1 and "recall" not in names:
        y += f", of {drafts.pop()}"
    lines = {}
    if x == "policy":
        labels = drawing.names_of(rows, without=[series])
        for row, label, figure in zip(rows, labels, figures, strict=True):
            of_series = lines.setdefault(drawing.in_words(series, row[series]), {})
            of_series[label] = figure
        drawing.dots(axes, lines, x=y)
        return
    labels = drawing.names_of(rows, without=[x, "less_index"])
    for row, label, figure in zip(rows, labels, figures, strict=True):
        place = sum(row[x]) / 2 if x == "contexts" else row[x]
        lines.setdefault(label, []).append((place, *figure))
    drawing.curves(axes, lines, x=x, y=y)


def draw(directory, kind):
    """Write figure.png and figure.svg of one run.

    Returns the PNG's path, or None if there is nothing to draw: a figure of an earlier
    time goes then.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsespec_jax"
    from matplotlib import pyplot

    directory = pathlib.Path(directory)
    summary = record.read_json(directory / "summary.json")
    config, records = record.load(directory)
    environment = record.read_json(directory / "environment.json")
    name = config.get("study", kind.name).replace("_", " ")
    name = f"Study {name}" if "study" in config else name.capitalize()
    title = drawing.title_of(name, config, evidence.device_of(environment), records)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    kind.figure(axes, summary, records)
    files = [directory / f"figure.{suffix}" for suffix in ("png", "svg")]
    if not axes.has_data():
        pyplot.close(figure)
        for file in files:
            file.unlink(missing_ok=True)
        return None
    drawing.finish(figure, axes, title)
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else {}  # the same each time
        with signals.deferred():
            figure.savefig(file, dpi=120, metadata=metadata)
            signals.kept(file)
    pyplot.close(figure)
    return files[0]


def main(values):
    """Draw every run found."""
    with launch.checking():
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError('figures need matplotlib: pip install -e ".[plots]"')
        found = drawable(values.results)
    for directory, kind in found:
        print(draw(directory, kind) or f"{directory}: no figure, for a single value")


if __name__ == "__main__":
    launch.run(main, FiguresConfig)
