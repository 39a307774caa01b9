"""How every figure looks: names, intervals, legend, title.

An experiment's `figure` calls `curves` (a number on the axis below) or `dots` (a name
on the axis at the left, the largest on top) with an interval for each point if it has
one; `figures.draw` adds the title and the legend, which is outside of the data. All
intervals are of 95 %.
"""

from __future__ import annotations

import collections
import json

INTERVAL = "95 % interval over texts"
POLICIES = {
    "full": "everything",
    "oracle": "best set for each draft (oracle)",
    "hindsight": "best set for a cycle (hindsight)",
    "pillar": "PillarAttn",
    "window": "first and newest (window)",
    "recents": "newest (recents)",
    "random": "at random",
    "index": "index, 4 bits",
    "index_2bit": "index, 2 bits",
    "h2o": "H2O",
    "lserve": "LServe",
    "quest": "Quest",
    "quest_step": "Quest, at each step",
    "snapkv": "SnapKV",
    "vegas": "Vegas",
}
_PROPOSERS = {"self": "", "cascade": "cascade", "eagle": "trained head"}
_WORDS = {
    "mode": lambda v: {"decode": "decoded", "replay": "replayed"}[v],
    "budget_ratio": lambda v: f"{100 * v:g} % of the context",
    "min_budget": lambda v: f"at least {v} tokens" if v else "no floor",
    "num_draft_tokens": lambda v: f"{v} drafts",
    "temperature": lambda v: f"temperature {v:g}" if v else "greedy",
    "mass_rows": lambda v: "all rows" if v == "all" else "first and last row",
    "scope": lambda v: "a set per KV head" if v == "kv_head" else f"a set per {v}",
    "acceptor": lambda v: str(v).replace("_", " "),
    "num_recent": lambda v: f"{v} newest added" if v else "none added",
    "proposer": lambda v: _PROPOSERS.get(v, v),
    "draft_steps": lambda v: f"{v} draft steps" if v else "",
    "num_guesses": lambda v: f"{v} guesses" if v else "",
    "text_temperature": lambda v: "" if v is None else f"text of temperature {v:g}",
    "contexts": lambda v: f"texts of {v[0]:,} to {v[1]:,} tokens",
    "less_index": lambda v: "less its index" if v else "",
}
AXES = {
    "expected_accepted": "drafts accepted in replay, expected",
    "mean_accepted_draft_tokens": "drafts accepted",
    "recall": "recall: share of attention that is read",
    "budget_ratio": "share of the context that a draft reads",
    "num_draft_tokens": "drafts a cycle",
    "draft_steps": "draft steps a cycle",
    "contexts": "length of the text, tokens",
}


def axis(name):
    """What an axis of a field or figure is called."""
    return AXES.get(name, name.replace("_", " "))


def policy(name):
    """What a policy is called; a variant of PillarAttn says so."""
    if name.startswith("pillar_"):
        name = f"{POLICIES['pillar']}, {name.removeprefix('pillar_')}"
    return POLICIES.get(name, name.replace("_", " "))


def in_words(name, value):
    """A setting of a row of a study; "" if it goes without saying."""
    if name == "policy":
        return policy(value)
    return _WORDS[name](value) if name in _WORDS else f"{name} {value}"


def names_of(rows, *, without):
    """A name for each row: who drafts, then each setting that most rows have not.

    `rows` are dicts of the fields of a study's Row. The fields of `without` stand
    elsewhere in the figure.
    """
    fields = [name for name in rows[0] if name not in (*without, "policy")]
    usual = {name: _most_common([row[name] for row in rows]) for name in fields}
    return [_name(row, usual, has_policy="policy" not in without) for row in rows]


def _name(row, usual, *, has_policy):
    parts = [policy(row["policy"])] if has_policy else []
    if row["proposer"] == "ngram":  # it reads no context: no policy, no budget
        return "n-gram lookup"
    for name, most in usual.items():
        is_known = name == "budget_ratio" and row["policy"] == "full"
        if row[name] != most and not is_known:
            parts.append(in_words(name, row[name]))
    return ", ".join(filter(None, parts))


def _most_common(values):
    keys = [json.dumps(value) for value in values]
    return json.loads(collections.Counter(keys).most_common(1)[0][0])


def curves(axes, lines, *, x, y):
    """Lines by name: lists of (x, y) or (x, mean, low, high), in any order.

    Nothing is drawn if no line has two values of x: that is no curve.
    """
    lines = {name: sorted(points) for name, points in lines.items() if points}
    if all(len({point[0] for point in points}) < 2 for points in lines.values()):
        return
    for name, points in lines.items():
        places, means = ([point[i] for point in points] for i in (0, 1))
        errors = _errors([point[1:] for point in points])
        style = "o-" if len(points) < 40 else "-"
        axes.errorbar(places, means, errors, fmt=style, capsize=3, label=name)
    has_interval = any(len(point) > 2 for points in lines.values() for point in points)
    axes.set_xlabel(axis(x))
    axes.set_ylabel(axis(y) + has_interval * f"\n({INTERVAL})")


def dots(axes, series, *, x):
    """Points by name of the series and of the row: a value or (mean, low, high).

    Rows have one place each, sorted by their means of all series.
    """
    sums = collections.defaultdict(list)
    for points in series.values():
        for name, point in points.items():
            sums[name].append(_as_point(point)[0])
    names = sorted(sums, key=lambda name: sum(sums[name]) / len(sums[name]))
    if len(names) < 2:
        return
    for number, (label, points) in enumerate(series.items()):
        shift = 0.5 * ((number + 0.5) / len(series) - 0.5)
        found = [_as_point(points[name]) for name in names if name in points]
        places = [i - shift for i, name in enumerate(names) if name in points]
        errors = _errors(found)
        means = [point[0] for point in found]
        axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.figure.set_size_inches(8, 1.6 + 0.26 * len(names))
    has_interval = any(
        isinstance(point, tuple)
        for points in series.values()
        for point in points.values()
    )
    axes.set_xlabel(axis(x) + has_interval * f" ({INTERVAL})")


def interval_of(figure):
    """(mean, low, high) of a figure over texts."""
    if "interval" in figure:
        return figure["mean"], *figure["interval"]
    width = 1.96 * figure["standard_error"]  # of files from before intervals were kept
    return figure["mean"], figure["mean"] - width, figure["mean"] + width


def _as_point(point):
    return point if isinstance(point, tuple) else (point,)


def _errors(points):
    """[below, above] of (mean, low, high), None of means alone."""
    if any(len(point) < 3 for point in points):
        return None
    return [[p[0] - p[1] for p in points], [p[2] - p[0] for p in points]]


def title_of(name, config, environment_device, records):
    """Of what a figure is: experiment, model, device and number of texts."""
    models = [config.get("model"), config.get("load")]
    model = next(filter(None, models), "")
    kind = ", ".join(filter(None, [model, config.get("dtype")]))
    where = f"on {environment_device}"
    texts = sorted(set(_numbers_of_texts(records)))
    if texts:
        count = f"{texts[0]}" if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
        where += f"; {count} text{'s' * (texts[-1] > 1)}"
    return f"{name}{': ' * bool(kind)}{kind}\n{where}"


def _numbers_of_texts(records):
    for record in records:
        for value in record.values():
            if isinstance(value, dict) and "num_contexts" in value:
                yield value["num_contexts"]


def finish(figure, axes, title, legend=""):
    """Title, grid and the legend, which is needed for two series only."""
    axes.set_title(title, fontsize="medium", loc="left")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles, labels, loc="outside right upper", fontsize="small", title=legend
        )
