"""What of experiments/results may support a sentence, and what may not.

A file or run directory is evidence if one command made it, from a clean commit, and all
rows that it was asked for are there. An entry is a file or folder right below the
results folder.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from experiments import made_up, record
from experiments.loads import LOADS
from experiments.study import as_json, recorded, split
from experiments.study_config import load_study

# Bytes of an index come off the budget of some rows, by head size and bits of K and V.
# Runs that do not say theirs took SmolLM2 in bfloat16.
_CACHE = {"head_dim": 64, "kv_bits": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What an entry says of itself.

    Attributes:
        path: the file or folder.
        device: where it was measured, "" if the entry does not say.
        command: what made it, "" if the entry does not say.
        dirty: the working copy was changed; None if the entry does not say.
        rows: (found, wanted), or None where the entry does not tell.
        study: name of the study if it is a run of one, else None.
    """

    path: pathlib.Path
    device: str
    command: str
    dirty: bool | None
    rows: tuple[int, int] | None
    study: str | None = None

    def why_not(self):
        """Why no sentence may lean on the entry; "" if one may."""
        if self.rows and self.rows[0] < self.rows[1]:
            return "incomplete: {} of {} rows".format(*self.rows)
        if self.dirty:
            return "changed working copy"
        if not self.command:
            return "does not say which command made it"
        return ""


def read(path):
    """The Entry of a results file or run directory."""
    path = pathlib.Path(path)
    study = rows = None
    if path.is_dir() and (path / "environment.json").exists():
        environment = record.read_json(path / "environment.json")
        study = record.read_json(path / "config.json").get("study")
        rows = _study_rows(path) if study else None
    else:
        data = _read_file(path / "results.json" if path.is_dir() else path)
        environment, rows = environment_of(data), _file_rows(data)
    return Entry(
        path=path,
        device=device_of(environment),
        command=environment["command"],
        dirty=environment.get("dirty"),
        rows=rows,
        study=study,
    )


def entries(results):
    """{name: Entry} of the results files and run directories in a folder."""
    return {
        path.name: read(path)
        for path in sorted(pathlib.Path(results).iterdir())
        if path.suffix == ".json"
        or (path / "environment.json").exists()
        or (path / "results.json").exists()
    }


def device_of(environment):
    """Name of the device: of the processor where there is no other."""
    if environment["backend"] == "cpu":
        return f"{environment['cpu']}, {environment['num_cores']} cores"
    return ", ".join(sorted(set(filter(None, environment["devices"]))))


def environment_of(data):
    """The environment of a results file; those of the benchmark hold less of it."""
    # Only files that the benchmark wrote name an implementation.
    command = "python -m pallas_kernels.bench" if "impl" in data else ""
    found = data.get("environment", {"command": command})
    device = found.get("device") or data.get("device")
    return {"devices": [device], "backend": "", "command": ""} | found


def _read_file(path):
    data = json.loads(path.read_text())
    return data if isinstance(data, dict) else {}  # a list: texts to measure on


def _file_rows(data):
    """(found, wanted) of a results file whose flags say what was asked for."""
    flags, found = data.get("flags", {}), data.get("rows", [])
    if "lags" in flags:  # lossless
        return len(found), len(flags["lags"]) * len(flags["page_sizes"])
    if "policies" in flags:  # simulate
        return len(found), len(flags["policies"])
    if "slots" in flags:  # speedup_map
        return len(found), _points_of_map(data)
    if "measure" in flags:  # train_eagle
        return len(data["accepted_drafts"]), len(flags["measure"])
    if "repeats" in flags and "trace_steps" in flags:  # throughput
        runs = data["runs"].values()
        return sum(map(len, runs)), 2 * flags["repeats"]
    if "contexts" in flags and "load" in flags:  # step_time
        return sum(len(r["ms_per_step"]) for r in found), 2 * len(flags["contexts"])
    if isinstance(flags.get("rows"), list):  # acceptance
        return len(found), len(flags["rows"])
    return None


def _points_of_map(data):
    """Points of a map of speed-ups that its pool can hold."""
    flags = data["flags"]
    load, model = LOADS[flags["load"]], flags["model"]
    points = 0
    for slots in map(int, flags["slots"]):
        of_slots = dataclasses.replace(
            load, model=model or load.model, num_slots=slots, num_requests=slots
        )
        choices = [int(k) for k in flags["choices"]]
        points += sum(
            made_up.fits(of_slots, choices, int(n), flags["kv_gib"] * 2**30)
            for n in flags["lengths"]
        )
    return points


def _study_rows(path):
    """(found, wanted) of a study: of the modes, decoding and replay, that were run."""
    config, records = record.load(path)
    study, _ = load_study(config["study"])
    cache = {name: config.get(name, value) for name, value in _CACHE.items()}
    rows, _ = split(lambda row: row.for_model(**cache), study.rows)
    found = [recorded(r["row"]) for r in records]
    modes = {row["mode"] for row in found} or {row.mode for row in rows}
    wanted = [as_json(row) for row in rows if row.mode in modes]
    return sum(row in found for row in wanted), len(wanted)
