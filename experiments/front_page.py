"""The picture of README.md: what a draft of 5 % is worth, and where that pays.

    python -m experiments.front_page --output docs/front_page.svg

Left: accepted drafts by what a draft reads, SmolLM2-135M with its weights. Right:
speed-up over plain decoding by context length, shapes of Qwen3-8B with random weights
and an assumed acceptance. Both are drawn from results files, whose hashes the picture
carries. Needs the extra `plots`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import pathlib

from absl import app

from experiments import drawing, launch, record
from experiments.options import Writes, option

STUDY = "study_policies_replay_cpu"
MAP = "speedup_map_h100.json"
TEMPERATURE = 0.65
BARS = {
    "full": "everything",
    "oracle": "best for each draft",
    "pillar": "PillarAttn",
    "window": "first and newest",
    "random": "at random",
}


def sources(results):
    """ "NAME sha256 HASH; ..." of the two results files that the picture shows."""
    results = pathlib.Path(results)
    files = [results / STUDY / "results.jsonl", results / MAP]
    return "; ".join(
        f"{path.relative_to(results)} sha256 "
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in files
    )


def accepted(results):
    """[(label, (mean, low, high))], one for each of BARS, and of what."""
    directory = pathlib.Path(results) / STUDY
    config, records = record.load(directory)
    environment = json.loads((directory / "environment.json").read_text())
    found = {r["policy"]: r for r in records if r["temperature"] == TEMPERATURE}
    figures = [
        (label, drawing.interval_of(found[name]["expected_accepted"]))
        for name, label in BARS.items()
    ]
    row = found["pillar"]
    setting = {
        "drafts": row["num_draft_tokens"],
        "share": row["budget_ratio"],
        "model": config["model"],
        "device": environment["backend"].upper(),
        "texts": row["expected_accepted"]["num_contexts"],
    }
    return figures, setting


def speedups(results):
    """{requests: [(context length, speed-up of the chosen k)]}, and of what."""
    data = json.loads((pathlib.Path(results) / MAP).read_text())
    lines = {}
    for row in data["rows"]:
        point = row["context_length"], row["chosen_speedup"]
        lines.setdefault(row["slots"], []).append(point)
    (device,) = set(data["environment"]["devices"])
    setting = {
        "acceptance": data["flags"]["acceptance"],
        "model": data["load"]["model"],
        "device": " ".join(device.split()[:2]),
    }
    return lines, setting


def _draw_accepted(axes, bars, setting):
    labels, figures = zip(*reversed(bars), strict=True)
    means = [mean for mean, _, _ in figures]
    errors = [[m - low for m, low, _ in figures], [high - m for m, _, high in figures]]
    colors = ["C0" if label == BARS["pillar"] else "0.8" for label in labels]
    axes.barh(labels, means, xerr=errors, color=colors, capsize=3)
    for place, mean in enumerate(means):
        axes.text(0.15, place, f"{mean:.1f}", va="center")
    axes.set_xlim(0, 1.05 * setting["drafts"])
    axes.set_xlabel(
        f"accepted of {setting['drafts']} drafts ({drawing.INTERVAL})", fontsize=9
    )
    axes.set_title(
        f"A draft reads {100 * setting['share']:.0f} % of the KV cache: which?\n"
        f"{setting['model']} with its weights, {setting['device']}, "
        f"{setting['texts']} texts",
        fontsize=10,
    )


def _draw_speedups(axes, lines, setting):
    for slots, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=f"{slots} requests")
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("context length, tokens")
    axes.set_ylabel("times plain decoding")
    axes.set_title(
        f"Where that pays: {setting['model']} shapes, {setting['device']}\n"
        f"random weights, chance {setting['acceptance']:g} of a draft assumed",
        fontsize=10,
    )
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)


def draw(results, output):
    """Write the picture as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsespec_jax"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        ncols=2, figsize=(10.5, 3.4), layout="constrained"
    )
    _draw_accepted(left, *accepted(results))
    _draw_speedups(right, *speedups(results))
    metadata = {"Description": sources(results), "Date": None}
    figure.savefig(output, format="svg", metadata=metadata)
    pyplot.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontPageConfig(Writes):
    """Where the results are."""

    results: str = option("experiments/results", "Folder to read.")


def main(values):
    """Draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise app.UsageError('a picture needs matplotlib: pip install -e ".[plots]"')
    output = pathlib.Path(values.output)
    if output.suffix != ".svg":
        raise app.UsageError(f"--output must end in .svg, got {values.output!r}")
    draw(values.results, output)
    print(output)


if __name__ == "__main__":
    launch.run(main, FrontPageConfig)
