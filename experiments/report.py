"""One page of everything measured: claims, what we found, on what, by what command.

    python -m experiments.report --output docs/report.md

Reads every results file and run directory below --results; writes Markdown, or HTML if
the name of the page ends in .html. A claim stands beside a figure only where the file
is evidence (`experiments.evidence`): an incomplete run, or one from a changed working
copy, is named at the end of the page and shows neither table nor picture.
"""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib

from experiments import claims, evidence, launch, record
from experiments.claims import NOT_MEASURED, figure
from experiments.options import Writes, option
from experiments.study_config import Row, as_json, load_study, study_names

_HEADER = ("claim", "verdict", "measured", "device", "rows", "command")
_INTRO = """\
Made by `python -m experiments.report --output docs/report.md`, not by hand.

- Claims are those of SparseSpec (arXiv 2512.01278) unless they are marked "own".
- The verdict is "met", "missed", "undecided" (within two standard errors) or "not
  measured". It is empty where a claim names no figure to meet.
- Rows are "found of wanted", a question mark where an older file does not tell. Only
  runs that are complete and of a clean commit count; of others the rows are named too.
- The paper measures models of 8B and more. Where a row says smollm2 (135M) or random
  weights, it is another question than the paper's."""


def collect(results):
    """(rows of the page, {name: Entry}); a row has the names of _HEADER and "entry"."""
    found = evidence.entries(results)
    rows, judged = [], set()
    for claim, judges in claims.CLAIMS:
        pairs = [
            (entry, judge)
            for whose, judge in judges.items()
            for entry in found.values()
            if _is_of(entry, whose)
        ]
        usable = [pair for pair in pairs if not pair[0].why_not()]
        rows += [_row_of(claim, *judge(e.content()), entry=e) for e, judge in usable]
        if not usable:
            wanted = sum(map(_num_wanted, judges))
            rows.append(_not_measured(claim, [e for e, _ in pairs], wanted))
        judged |= {entry.path.name for entry, _ in pairs}
    rows += _other_studies(found)
    for name, entry in found.items():
        if not (name in judged or entry.study or entry.why_not()):
            what = entry.content().get("what", "see the file")
            rows.append(_row_of("own: see its command", "", what, entry=entry))
    return rows, found


def _is_of(entry, whose):
    """Whether an entry is the study or of the experiment that CLAIMS asks for."""
    if whose.startswith("study:"):
        return entry.study == whose.removeprefix("study:")
    return entry.is_of(whose)


def _num_wanted(whose):
    """Rows that whom CLAIMS asks for would measure; of an experiment at least one."""
    if whose.startswith("study:"):
        return len(load_study(whose.removeprefix("study:"))[0].rows)
    return 1


def _row_of(claim, verdict, measured, *, entry):
    return {
        "claim": claim,
        "verdict": verdict,
        "measured": measured,
        "device": entry.device,
        "rows": entry.rows,
        "command": entry.command,
        "entry": entry,
    }


def _not_measured(claim, entries, wanted):
    """The row of a claim that no entry, or none of these, is evidence for."""
    return dict.fromkeys(_HEADER, "") | {
        "claim": claim,
        "verdict": NOT_MEASURED,
        "measured": _reasons(entries),
        "rows": "; ".join(entry.rows for entry in entries) or f"0 of {wanted}",
        "entry": None,
    }


def _reasons(entries):
    """Why none of these counts, in words."""
    return "; ".join(f"{entry.path.name}: {entry.why_not()}" for entry in entries)


def _other_studies(found):
    """Rows of the studies that no judge answers for: their claim, what they show."""
    asked = {whose for _, judges in claims.CLAIMS for whose in judges}
    for name in study_names():
        if f"study:{name}" in asked or name == "everything":  # the others' rows
            continue
        study, _ = load_study(name)
        entries = [entry for entry in found.values() if entry.study == name]
        usable = [entry for entry in entries if not entry.why_not()]
        for entry in usable:
            yield _row_of(study.claim, "", _headline(entry), entry=entry)
        if not usable:
            yield _not_measured(study.claim, entries, len(study.rows))


_SHOWN = 5  # rows of a study in its line


def _headline(entry):
    """The first rows in a line: what the figure of the study shows."""
    summary, records, texts = entry.run.figures, entry.run.rows, []
    for row in records[:_SHOWN]:
        own = row["proposer"] if row["proposer"] != "self" else row["policy"]
        name = (
            own if summary["series"] in ("mode", "policy") else row[summary["series"]]
        )
        at = "" if summary["x"] == "policy" else f" at {_setting(row[summary['x']])}"
        value = figure(row.get(summary["y"]) or row.get("expected_accepted"))
        texts.append(f"{name}{at}: {value}")
    more = len(records) - _SHOWN
    name = summary["y"].replace("_", " ")
    return f"{name}: {', '.join(texts)}" + (f"; {more} more below" if more > 0 else "")


def study_table(summary, records):
    """Header and rows of one study: what varied, then every figure worth a column."""
    fields = as_json(Row())
    varied = [n for n in fields if len({json.dumps(r.get(n)) for r in records}) > 1]
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
        cells = [_setting(found.get(n)) for n in names]
        table.append([*cells, *(figure(found.get(n)) for n in used)])
    return table


def _setting(value):
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def study_sections(found):
    """(entry, claim, table) of every study that is evidence."""
    for entry in found.values():
        if entry.study and not entry.why_not():
            summary = entry.run.figures
            yield entry, summary["claim"], study_table(summary, entry.run.rows)


def as_markdown(collected, folder):
    """The page; sources and figures are linked relative to `folder`."""
    rows, found = collected
    lines = ["# What is measured", "", _INTRO, "", _row(_HEADER)]
    lines.append(_row(["---"] * len(_HEADER)))
    for row in rows:
        cells = [row[name] for name in _HEADER]
        if row["entry"]:
            cells[2] = f"[{cells[2]}]({_relative(row['entry'].path, folder)})"
        cells[-1] = cells[-1] and f"`{cells[-1]}`"
        lines.append(_row(cells))
    for entry, claim, table in study_sections(found):
        lines += ["", f"## {entry.path.name}", "", f"Asked: {claim}.", ""]
        lines += [_row(table[0]), _row(["---"] * len(table[0]))]
        lines += [_row(cells) for cells in table[1:]]
        picture = entry.path / "figure.png"
        if picture.exists():
            lines += ["", f"![{claim}]({_relative(picture, folder)})"]
    if left_out := _left_out(found):
        lines += ["", "## Left out", "", "No claim leans on these.", ""]
        lines += [f"- `{name}`: {why}" for name, why in left_out]
    return "\n".join(lines) + "\n"


def _left_out(found):
    """[(name, why no claim leans on it)]."""
    return [(name, why) for name, entry in found.items() if (why := entry.why_not())]


def _row(cells):
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _relative(path, folder):
    return pathlib.Path(path).resolve().relative_to(folder.resolve(), walk_up=True)


def as_html(collected, folder):
    """The same page as one HTML file."""
    rows, found = collected

    def table(rows):
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
            for row in rows
        )
        return f"<table border=1>{cells}</table>"

    body = [table([_HEADER, *([row[n] for n in _HEADER] for row in rows)])]
    for entry, claim, of_study in study_sections(found):
        body += [f"<h2>{html.escape(claim)}</h2>", table(of_study)]
        picture = entry.path / "figure.svg"
        if picture.exists():
            body.append(f'<img src="{_relative(picture, folder)}">')
    body.append(table([("left out", "why"), *_left_out(found)]))
    page = "".join(body)
    return f"<!doctype html><meta charset=utf-8><h1>What is measured</h1>{page}\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(Writes):
    """Where the results are."""

    results: str = option("experiments/results", "Folder to read.")


def main(values):
    """Write the page."""
    output = pathlib.Path(values.output)
    with launch.checking():
        collected = collect(values.results)
        if not collected[1]:
            raise ValueError(f"--results {values.results} holds no results")
    make = as_html if output.suffix == ".html" else as_markdown
    output.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(output, make(collected, output.parent))
    print(f"{output}: {len(collected[1])} results")


if __name__ == "__main__":
    launch.run(main, ReportConfig)
