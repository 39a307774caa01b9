"""Join the parts of `experiments.study --part` into one run directory per study.

    python -m experiments.join_studies PART PART ... --output experiments/results \
        --suffix h100

A study is written if a part holds one of its rows; rows come in the study's order, and
study_everything has them all. Parts must be of the same contexts, model and policies,
and may differ in what changes no token: slots, pages, chunks and kernels.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

from experiments import launch, record, signals
from experiments.options import Writes, option
from experiments.study import axes_of
from experiments.study_config import as_json, as_row, load_study, split, study_names

_FOLDERS = re.compile(r"(?<=[ =,])/[^ ,]*/")  # of the machine that measured
_FREE = (
    "num_slots", "page_size", "prefill_chunk", "prefill_lanes", "impl", "study",
    "kernels",
)  # fmt: skip


def join(parts, output, *, suffix):
    """{study: (rows found, rows wanted)} of the run directories written.

    Raises:
      ValueError: no runs of one study, or of different settings or contexts; or an
        output directory exists.
    """
    settings, found, commits = [], {}, {}
    for part in map(pathlib.Path, parts):
        config, records = record.load(part)
        inputs = record.read_json(part / "inputs.json")
        settings.append((config, inputs))
        for first, now in zip(settings[0], settings[-1], strict=True):
            names = (first.keys() | now.keys()) - set(_FREE)
            if changed := record.differences(first, now, sorted(names)):
                raise ValueError(f"{part} is of another run than {parts[0]}: {changed}")
        found |= {as_row(r): r for r in records}
        environment = record.read_json(part / "environment.json")
        environment["command"] = _FOLDERS.sub("", environment["command"])
        commits[environment.get("commit")] = None
    environment["commits"] = list(commits)  # of all parts; the rest is the last one's
    config, inputs = settings[0]
    if inputs.get("launcher") != "study":
        raise ValueError(f"{parts[0]} holds no run of experiments.study")
    cache = {name: inputs[name] for name in ("head_dim", "kv_bits")}
    free = {name: value for name, value in config.items() if name not in _FREE}
    written = {}
    for name in study_names():
        study, header = load_study(name)
        wanted, _ = split(lambda row: row.for_model(**cache), study.rows)
        rows = [as_json(row) | found[row] for row in wanted if row in found]
        if not rows:
            continue
        path = pathlib.Path(output) / f"study_{name}_{suffix}"
        with record.RunDirectory(
            path, config=free | {"study": name}, inputs=inputs, resume=False
        ) as directory:
            directory.write_environment(environment)
            for row in rows:
                directory.append(row)
            summary = {"experiment": "study", "claim": study.claim}
            summary |= {"rows_wanted": len(wanted), "rows_found": len(rows)}
            summary |= axes_of(study, header)
            with signals.deferred():
                directory.write_summary(summary)
                signals.kept(path)
        written[name] = len(rows), len(wanted)
    return written


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinConfig(Writes):
    """How the directories are called."""

    suffix: str = option(text="study_NAME_SUFFIX.")


def main(values, parts):
    """Join the parts named on the command line."""
    with launch.checking():
        if not parts:
            raise ValueError("name the run directories to join")
        written = join(parts, values.output, suffix=values.suffix)
    for name, (rows, wanted) in written.items():
        print(f"{name}: {rows} of {wanted} rows")


if __name__ == "__main__":
    launch.run(main, JoinConfig, takes_arguments=True)
