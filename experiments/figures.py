"""Figures of the studies: one PNG and one SVG in every run directory.

    python -m experiments.figures --results experiments/results

Needs the extra `plots`. A study names its axes; a row's interval is its error bar.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib

from absl import flags

from experiments import launch, record, signals


def study_directories(results):
    """Run directories of studies with a row or more below `results`, by name."""
    found = []
    for path in sorted(pathlib.Path(results).glob("**/summary.json")):
        if "claim" in record.read_json(path) and record.load(path.parent)[1]:
            found.append(path.parent)
    return found


def lines_of(summary, records):
    """{series: [(x, mean, low, high)]} in the order of the rows.

    A series also names every other setting in which its rows differ.
    """
    x, y, series = summary["x"], summary["y"], summary["series"]
    varied = [
        name
        for name in records[0]["row"]
        if name not in (x, series)
        and len({json.dumps(r["row"][name]) for r in records}) > 1
    ]
    if x == "policy":
        varied = [v for v in varied if v not in ("budget_ratio",)]
    lines = {}
    for found in records:
        row = found["row"]
        figure = found.get(y) or found.get("expected_accepted")
        label = " ".join(
            [str(row[series]), *(f"{name}={row[name]}" for name in varied)]
        )
        low, high = figure["interval"]
        lines.setdefault(label, []).append((row[x], figure["mean"], low, high))
    return lines


def draw(directory):
    """Write figure.png and figure.svg of one study; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsespec_jax"
    from matplotlib import pyplot

    directory = pathlib.Path(directory)
    _, records = record.load(directory)
    summary = record.read_json(directory / "summary.json")
    lines = lines_of(summary, records)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, points in lines.items():
        names = [p[0] for p in points]
        is_number = all(isinstance(name, int | float) for name in names)
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
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else {}  # the same file each time
        with signals.deferred():
            figure.savefig(directory / f"figure.{suffix}", dpi=120, metadata=metadata)
            signals.kept(directory / f"figure.{suffix}")
    pyplot.close(figure)
    return directory / "figure.png"


def main():
    """Draw every study found."""
    with launch.checking():
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError('figures need matplotlib: pip install -e ".[plots]"')
        found = study_directories(flags.FLAGS.results)
    for directory in found:
        print(draw(directory))


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/results", "Folder of run directories.")
    launch.run(main)
