"""Figures of runs: one PNG and one SVG in every complete run directory.

    python -m experiments.figures --results experiments/results

Needs the extra `plots`. Each experiment draws its own (`Experiment.figure`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib

from experiments import experiment, launch, reader, record, signals
from experiments.options import Options, option
from experiments.study_config import Row, as_json


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


def lines_of(summary, records):
    """{series: [(x, mean, low, high)]} of a study, in the order of the rows.

    A series also names every other setting in which its rows differ.
    """
    x, y, series = summary["x"], summary["y"], summary["series"]
    varied = [
        name
        for name in as_json(Row())
        if name not in (x, series)
        and len({json.dumps(r.get(name)) for r in records}) > 1
    ]
    if x == "policy":
        varied = [v for v in varied if v not in ("budget_ratio",)]
    lines = {}
    for row in records:
        figure = row.get(y) or row.get("expected_accepted")
        label = " ".join(
            [str(row[series]), *(f"{name}={row[name]}" for name in varied)]
        )
        low, high = figure["interval"]
        lines.setdefault(label, []).append((row[x], figure["mean"], low, high))
    return lines


def study_lines(axes, summary, records):
    """A study: it names its axes, and a row's interval is its error bar."""
    for label, points in lines_of(summary, records).items():
        is_number = all(isinstance(p[0], int | float) for p in points)
        if is_number:
            points = sorted(points)
        places = [p[0] if is_number else str(p[0]) for p in points]
        means = [p[1] for p in points]
        errors = [[p[1] - p[2] for p in points], [p[3] - p[1] for p in points]]
        style = "o-" if is_number else "o"
        axes.errorbar(places, means, errors, fmt=style, capsize=3, label=label)
    axes.set_xlabel(summary["x"].replace("_", " "))
    axes.set_ylabel(summary["y"].replace("_", " "))
    if not is_number:
        for name in axes.get_xticklabels():
            name.set(rotation=60, ha="right", rotation_mode="anchor")


def draw(directory, kind):
    """Write figure.png and figure.svg of one run; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsespec_jax"
    from matplotlib import pyplot

    directory = pathlib.Path(directory)
    summary = record.read_json(directory / "summary.json")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    kind.figure(axes, summary, record.load(directory)[1])
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else {}  # the same file each time
        with signals.deferred():
            figure.savefig(directory / f"figure.{suffix}", dpi=120, metadata=metadata)
            signals.kept(directory / f"figure.{suffix}")
    pyplot.close(figure)
    return directory / "figure.png"


def main(values):
    """Draw every run found."""
    with launch.checking():
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError('figures need matplotlib: pip install -e ".[plots]"')
        found = drawable(values.results)
    for directory, kind in found:
        print(draw(directory, kind))


if __name__ == "__main__":
    launch.run(main, FiguresConfig)
