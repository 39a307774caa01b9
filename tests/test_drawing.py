"""Figures: one style, readable names, one place per row, nothing without a curve."""

import json
import pathlib

import matplotlib.pyplot
import pytest

from experiments import drawing, experiment, figures, reader, record, study
from experiments.study_config import Row, as_json, as_row

RESULTS = pathlib.Path(figures.__file__).parent / "results"
STUDIES = sorted(p for p in RESULTS.glob("study_*") if reader.read(p).is_complete)


@pytest.fixture
def axes():
    matplotlib.use("Agg")
    figure, axes = matplotlib.pyplot.subplots(figsize=(8, 4), layout="constrained")
    yield axes
    matplotlib.pyplot.close(figure)


def row(**fields):
    return as_json(Row(**fields))


def test_rows_are_named_by_what_most_have_not():
    rows = [
        row(), row(mass_rows="edges"), row(scope="layer"), row(num_recent=8),
        row(proposer="ngram"), row(policy="full", budget_ratio=1.0),
        row(policy="top_p", budget_ratio=0.2), row(policy="pillar_last"),
        row(proposer="cascade", draft_steps=6, num_guesses=3),
        row(policy="own_one", temperature=0.0, acceptor="ratio_test", min_budget=4),
    ]  # fmt: skip
    assert drawing.names_of(rows, without=["mode"]) == [
        "PillarAttn",
        "PillarAttn, first and last row",
        "PillarAttn, a set per layer",
        "PillarAttn, 8 newest added",
        "n-gram lookup",
        "everything",
        "top p, 20 % of the context",
        "PillarAttn, last",
        "PillarAttn, cascade, 6 draft steps, 3 guesses",
        "own one, at least 4 tokens, greedy, ratio test",
    ]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_row_of_a_study_has_a_place_of_its_own(path, axes):
    summary = record.read_json(path / "summary.json")
    records = record.load(path)[1]
    figures.study_lines(axes, summary, records)
    drawn = [line for line in axes.containers if line.get_label()]
    assert sum(len(line[0].get_xdata()) for line in drawn) == len(records)
    if summary["x"] != "policy":
        return
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(set(labels)) == len(labels)
    assert not [label for label in labels if "=" in label or "None" in label]
    series = {json.dumps(as_json(as_row(r))[summary["series"]]) for r in records}
    assert len(labels) * len(series) == len(records)
    for line in drawn:  # sorted, the largest mean of all series on top
        places = [round(place) for place in line[0].get_ydata()]
        assert places == sorted(places)
    means = [line[0].get_xdata() for line in drawn]
    of_all = [sum(each) for each in zip(*means, strict=True)]
    assert of_all == sorted(of_all)


def test_a_single_value_is_no_curve_and_a_single_row_no_comparison(axes):
    points = {"a": [(1, 2.0)], "b": [(1, 3.0), (1, 4.0)], "c": []}
    drawing.curves(axes, points, x="x", y="y")
    drawing.dots(axes, {"s": {"a": 1.0}, "t": {"a": 2.0}}, x="x")
    assert not axes.has_data()
    drawing.curves(axes, points | {"c": [(2, 1.0), (1, 5.0)]}, x="x", y="y")
    (line,) = [c[0] for c in axes.containers if c.get_label() == "c"]
    assert line.get_xdata().tolist() == [1, 2]


class Single(experiment.Experiment):
    """Draws what it has of a single load."""

    claim = "a point is no curve"

    @staticmethod
    def figure(axes, summary, records):
        points = [(r["load"], r["value"]) for r in records]
        drawing.curves(axes, {"a": points}, x="load", y="value")


def test_a_picture_of_nothing_is_not_left_there(tmp_path):
    for name, value in {
        "config": {"model": "tiny", "dtype": "float32"},
        "summary": {},
        "environment": {"backend": "gpu", "devices": ["GPU X"]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    lines = [{"load": n, "value": n} for n in (1, 2)]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = figures.draw(tmp_path, Single)
    assert picture == tmp_path / "figure.png" and picture.stat().st_size > 5000
    results.write_text(json.dumps(lines[0]) + "\n")
    assert figures.draw(tmp_path, Single) is None
    assert not list(tmp_path.glob("figure.*"))


def test_the_title_says_of_what_and_the_legend_hides_no_data(axes):
    path = RESULTS / "study_policies_replay_cpu"
    config, records = record.load(path)
    study.PolicyStudy.figure(axes, record.read_json(path / "summary.json"), records)
    title = drawing.title_of("Study policies", config, "AMD EPYC, 2 cores", records)
    assert title == "Study policies: smollm2, float32\non AMD EPYC, 2 cores; 16 texts"
    drawing.finish(axes.figure, axes, title)
    axes.figure.canvas.draw()
    (legend,) = axes.figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert [text.get_text() for text in legend.get_texts()] == [
        "temperature 0.65",
        "greedy",
    ]
    assert "95 % interval over texts" in axes.get_xlabel()
    assert axes.get_xlabel().startswith("drafts accepted in replay, expected, of 8")


def test_intervals_are_of_one_kind():
    assert drawing.interval_of({"mean": 2.0, "interval": [1.5, 2.75]}) == (2, 1.5, 2.75)
    assert drawing.interval_of({"mean": 2.0, "standard_error": 0.5}) == (
        pytest.approx((2, 1.02, 2.98))
    )
