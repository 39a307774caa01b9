"""Join the parts of `experiments.study --part` into one run directory per study.

    python -m experiments.join_studies PART PART ... --output experiments/results \
        --suffix h100

A study is written if a part holds one of its rows; rows come in the study's order, and
study_everything has them all. Parts may differ in what changes no token: slots, pages
and chunks.
"""

from __future__ import annotations

import json
import pathlib
import re

from absl import app, flags

from experiments import record
from experiments.study import as_json, recorded
from experiments.study_config import load_study, study_names

_FOLDERS = re.compile(r"(?<=[ =,])/[^ ,]*/")  # of the machine that measured
_FREE = ("num_slots", "page_size", "prefill_chunk", "prefill_lanes", "impl", "study")


def join(parts, output, *, suffix):
    """{study: (rows found, rows wanted)} of the run directories written.

    Raises:
      ValueError: parts of different settings, or an output directory exists.
    """
    configs, found, commits = [], {}, {}
    for part in parts:
        config, records = record.load(part)
        configs.append({k: v for k, v in config.items() if k not in _FREE})
        if configs[-1] != configs[0]:
            raise ValueError(
                f"{part} has another setting: {configs[-1]}, not {configs[0]}"
            )
        found |= {json.dumps(recorded(r["row"]), sort_keys=True): r for r in records}
        environment = json.loads((pathlib.Path(part) / "environment.json").read_text())
        environment["command"] = _FOLDERS.sub("", environment["command"])
        commits[environment.get("commit")] = None
    environment["commits"] = list(commits)  # of all parts; the rest is the last one's
    written = {}
    for name in study_names():
        study, header = load_study(name)
        keys = [json.dumps(as_json(row), sort_keys=True) for row in study.rows]
        rows = [found[key] for key in keys if key in found]
        if not rows:
            continue
        config = configs[0] | {"study": name}
        path = pathlib.Path(output) / f"study_{name}_{suffix}"
        with record.RunDirectory(path, config=config, resume=False) as directory:
            directory.write_environment(environment)
            for row in rows:
                directory.append(row | {"row": recorded(row["row"])})
            summary = {"claim": study.claim, "header": header, "x": study.x}
            summary |= {"series": study.series, "y": study.y}
            directory.write_summary(summary)
        written[name] = len(rows), len(keys)
    return written


def main(argv):
    """Join the parts named on the command line."""
    if len(argv) < 2:
        raise app.UsageError("name the run directories to join")
    written = join(argv[1:], flags.FLAGS.output, suffix=flags.FLAGS.suffix)
    for name, (rows, wanted) in written.items():
        print(f"{name}: {rows} of {wanted} rows")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Where the directories go.", required=True)
    flags.DEFINE_string("suffix", None, "study_NAME_SUFFIX.", required=True)
    app.run(main)
