"""One page of everything measured: the claim, what we found, on what, by what command.

    python -m experiments.report --output docs/report.md

Reads every results file and run directory below --results, except in folders whose name
ends in _partial (runs cut short, see LOG.md); writes Markdown, or HTML if the name of
the page ends in .html.
"""

from __future__ import annotations

import html
import json
import pathlib

from absl import flags

from experiments import launch, record


def _acceptance(data):
    return "; ".join(
        f"{row['policy']} s={row['budget_ratio']:g}: "
        + _figure(row["mean_accepted_draft_tokens"])
        for row in data["rows"]
    )


def _lossless(data):
    differing = sum(row["num_differing_tokens"] for row in data["rows"])
    return f"{differing} of {sum(r['num_tokens'] for r in data['rows'])} tokens differ"


def _kernels(data):
    found = [
        f"{name} {case['fraction_of_read']:.2f}"
        for name, case in data.get("cases", {}).items()
        if "fraction_of_read" in case
    ]
    return "of the read rate: " + ", ".join(found) if found else _other(data)


def _throughput(data):
    if "metrics" not in data:
        return _other(data)
    metrics = data["metrics"]
    forced = metrics["forced_acceptance"] is not None
    whole = metrics["spec_tokens_per_s"] / metrics["ar_tokens_per_s"]
    clock = data["runs"]["speculative"][0].get("device_clock")  # with --clock
    return (
        f"{metrics['speedup']:.2f} times plain decoding while all slots are busy, "
        f"bound {metrics['speed_of_light']:.2f}; {whole:.2f} times in all"
        + ("; acceptance forced, random weights" if forced else "")
        + (f"; {_idle(clock)}" if clock else "")
    )


def _idle(clock):
    share, window = clock["idle_between_steps_share"], clock["window_s"]
    return f"device idle between steps for {100 * share:.2g} % of {window:.1f} s"


def _map(data):
    gains = [row["chosen_speedup"] for row in data["rows"]]
    worst = min(row["chosen_of_best"] for row in data["rows"])
    return (
        f"the chosen k makes {min(gains):.2f} to {max(gains):.2f} times plain decoding "
        f"at {len(gains)} points, at least {worst:.2f} of the best fixed k"
    )


def _offload(data):
    found = data.get("metrics", {})
    ratios = [
        f"{found[key]:.2f} times {name}"
        for key, name in {
            "offload_over_offload_without_copies": "the same schedule without copies",
            "offload_over_recompute": "recomputing",
            "offload_over_reserve": "reserving",
        }.items()
        if key in found
    ]
    hidden = data.get("copies", {}).get("recorded_copies", {}).get("hidden_share")
    text = "spilling to host memory runs at " + ", ".join(ratios)
    return text + (f"; {hidden:.2f} of the copies beside kernels" if hidden else "")


def _simulator(data):
    by_policy = {row["policy"]: row for row in data["rows"]}
    return "share of the pool in use: " + ", ".join(
        f"{name} {row['utilisation']:.3f}" for name, row in by_policy.items()
    )


def _host(data):
    return "; ".join(
        f"{row['num_requests']} requests: plan {row['plan_us']:.0f} us, commit "
        f"{row['commit_us']:.0f} us" + _loop(row.get("loop_ms_by_lag"))
        for row in data["rows"]
    )


def _loop(by_lag):
    if by_lag is None:
        return ""
    times = ", ".join(f"{ms:.2f}" for ms in by_lag)
    return f", from step to step {times} ms at lag 0, 1, 2"


def _eagle(data):
    found = data["accepted_drafts"].items()
    counts = ", ".join(f"{name} {_figure(value)}" for name, value in found)
    return f"{counts} (head of {data['num_texts']} texts)"


def _other(data):
    return data.get("what", "see the file")


# Single measurements: how a file's (or its folder's) name begins -> (claim, content).
FILES = {
    "acceptance_": (
        "6.16 of 8 drafts accepted at s = 0.05 (arXiv 2512.01278, section 5)",
        _acceptance,
    ),
    "lossless_": ("the output equals plain decoding's, token by token", _lossless),
    "kernels_": (
        "attention, selection and gather run near the memory's rate",
        _kernels,
    ),
    "throughput": (
        "up to 2.13 times plain decoding (arXiv 2512.01278, section 6)",
        _throughput,
    ),
    "speedup_map": ("speculation is not slower than plain decoding", _map),
    "offload": (
        "KV offloading costs next to nothing (arXiv 2512.01278, section 4.4)",
        _offload,
    ),
    "kv_simulator": (
        "the pool is full without recomputation (arXiv 2512.01278, section 4.4)",
        _simulator,
    ),
    "host_cost": ("the host keeps ahead of the device", _host),
    "eagle": (
        "an EAGLE-3 head accepts fewer than 2 drafts (arXiv 2512.01278, section 5)",
        _eagle,
    ),
}
_UNFINISHED = "_partial"  # ends the name of a folder of runs cut short: see LOG.md
_SHOWN = 5  # rows of a study in its line
OTHER = ("measured for the claim that its command names", _other)


def _device(environment):
    kinds = ", ".join(sorted(set(environment["devices"])))
    if environment["backend"] == "cpu":
        kinds = f"{environment['cpu']}, {environment['num_cores']} cores"
    return kinds


def _entry(path, claim, measured, environment):
    return {
        "claim": claim,
        "measured": measured,
        "device": _device(environment),
        "command": environment["command"],
        "source": path,
    }


def file_entries(results):
    """Entries of the single results files, those that say what they ran on."""
    entries = []
    for path in sorted(pathlib.Path(results).rglob("*.json")):
        if path.parent.name.endswith(_UNFINISHED):
            continue
        data = record.read_json(path, of=(dict, list))
        if not isinstance(data, dict) or not {"environment", "device"} & data.keys():
            continue
        name = path.parent.name if path.name == "results.json" else path.name
        known = (FILES[begin] for begin in FILES if name.startswith(begin))
        claim, describe = next(known, OTHER)
        entries.append(_entry(path, claim, describe(data), _environment(data)))
    return entries


def _environment(data):
    """The environment of a file; older and shorter headers hold less of it."""
    # Only files that the benchmark wrote name an implementation.
    command = "python -m pallas_kernels.bench" if "impl" in data else ""
    found = data.get("environment", {"command": command})
    device = found.get("device") or data.get("device")
    return {"devices": [device], "backend": "", "command": ""} | found


def run_entries(results):
    """(entry, tables) of the run directories: studies and generate's demo."""
    for path in sorted(pathlib.Path(results).glob("**/summary.json")):
        summary = record.read_json(path)
        environment = record.read_json(path.parent / "environment.json")
        if "claim" in summary:
            _, records = record.load(path.parent)
            if not records:  # every row failed
                continue
            table = study_table(summary, records)
            measured = _headline(summary, records)
            yield _entry(path, summary["claim"], measured, environment), table
        elif "comparison" in summary:
            same = summary["comparison"]
            length = summary["speculative"]["total"]["mean_acceptance_length"]
            measured = (
                f"{same['num_identical']} of {same['num_tokens']} tokens identical; "
                f"acceptance length {length:.2f}"
            )
            claim = "the output equals plain decoding's, token by token"
            yield _entry(path, claim, measured, environment), []


def _headline(summary, records):
    """The first rows in a line: what the figure of the study shows."""
    shown = []
    for found in records[:_SHOWN]:
        row = found["row"]
        own = row["proposer"] if row["proposer"] != "self" else row["policy"]
        name = (
            own if summary["series"] in ("mode", "policy") else row[summary["series"]]
        )
        at = "" if summary["x"] == "policy" else f" at {_setting(row[summary['x']])}"
        shown.append(f"{name}{at}: ")
    figures = (
        _figure(found.get(summary["y"]) or found.get("expected_accepted"))
        for found in records[:_SHOWN]
    )
    line = ", ".join(map("".join, zip(shown, figures, strict=True)))
    more = len(records) - _SHOWN
    name = summary["y"].replace("_", " ")
    return f"{name}: {line}" + (f"; {more} more below" if more > 0 else "")


def study_table(summary, records):
    """Header and rows of one study: what varied, then every figure worth a column."""
    rows = [found["row"] for found in records]
    varied = [n for n in rows[0] if len({json.dumps(r[n]) for r in rows}) > 1]
    names = [summary["x"], *(n for n in varied if n != summary["x"])]
    figures = (
        "mean_accepted_draft_tokens",
        "committed_tokens_per_cycle",
        "kv_read_ratio_with_scores",
        "expected_accepted",
        "recall",
        "recall_oracle",
        "recall_hindsight",
        "recall_of_oracle",
        "jaccard",
        "count",
    )
    used = [n for n in figures if any(n in found for found in records)]
    table = [[*names, *used]]
    for found in records:
        cells = [_setting(found["row"][n]) for n in names]
        table.append([*cells, *(_figure(found.get(n)) for n in used)])
    return table


def _setting(value):
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(value):
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:.3g} +- {value['standard_error']:.2g}"
    return f"{value:.3g}"


def collect(results):
    """[(entry, table)] of all that is found below `results`."""
    singles = [(entry, []) for entry in file_entries(results)]
    return singles + list(run_entries(results))


def as_markdown(collected, folder):
    """The page; sources and figures are linked relative to `folder`."""
    lines = ["# What is measured", "", _row(["claim", "measured", "device", "command"])]
    lines.append(_row(["---"] * 4))
    for entry, _ in collected:
        link = _relative(entry["source"], folder)
        cells = [entry["claim"], f"[{entry['measured']}]({link})"]
        command = f"`{entry['command']}`" if entry["command"] else ""
        lines.append(_row([*cells, entry["device"], command]))
    for entry, table in collected:
        if table:
            lines += ["", f"## {entry['source'].parent.name}", "", entry["claim"], ""]
            lines += [_row(table[0]), _row(["---"] * len(table[0]))]
            lines += [_row(cells) for cells in table[1:]]
            figure = entry["source"].parent / "figure.png"
            if figure.exists():
                lines += ["", f"![{entry['claim']}]({_relative(figure, folder)})"]
    return "\n".join(lines) + "\n"


def _row(cells):
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _relative(path, folder):
    return pathlib.Path(path).resolve().relative_to(folder.resolve(), walk_up=True)


def as_html(collected, folder):
    """The same page as one HTML file."""

    def table(rows):
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
            for row in rows
        )
        return f"<table border=1>{cells}</table>"

    names = ("claim", "measured", "device", "command")
    body = [table([names, *([e[n] for n in names] for e, _ in collected)])]
    for entry, rows in collected:
        if rows:
            body += [f"<h2>{html.escape(entry['claim'])}</h2>", table(rows)]
            figure = entry["source"].parent / "figure.svg"
            if figure.exists():
                body.append(f'<img src="{_relative(figure, folder)}">')
    page = "".join(body)
    return f"<!doctype html><meta charset=utf-8><h1>What is measured</h1>{page}\n"


def main():
    """Write the page."""
    output = pathlib.Path(flags.FLAGS.output)
    with launch.checking():
        collected = collect(flags.FLAGS.results)
        if not collected:
            raise ValueError(f"--results {flags.FLAGS.results} holds no results")
    make = as_html if output.suffix == ".html" else as_markdown
    output.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(output, make(collected, output.parent))
    print(f"{output}: {len(collected)} results")


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/results", "Folder to read.")
    flags.DEFINE_string("output", None, "The page to write.", required=True)
    launch.run(main)
