"""Reads every run and results file, of any age: rows that pandas takes, and counts.

    import pandas
    from experiments.reader import load
    table = pandas.DataFrame(load("experiments/results/study_policies_replay_cpu"))

A row is a flat dict: what was asked for, then what was found. Parts of a figure have
names such as "recall.mean"; lists stay lists.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from experiments import made_up, record
from experiments.loads import LOADS
from experiments.prompts import load_prompts
from experiments.study_config import as_row, load_study, split

# Bytes of an index come off the budget of some rows, by head size and bits of K and V.
# Runs that do not say theirs took SmolLM2 in bfloat16.
_CACHE = {"head_dim": 64, "kv_bits": 16}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one command left.

    Attributes:
        path: a run directory or a results file.
        experiment: name of the module, "" if it does not say.
        flags: the options.
        rows: one dict for each row that is there, nested as it was measured.
        figures: all that is said of the rows together.
        environment: device, versions, command and commit.
        rows_found: how many of the rows asked for are there.
        rows_wanted: how many were asked for, None if it does not tell.
    """

    path: pathlib.Path
    experiment: str
    flags: dict[str, Any]
    rows: list[dict[str, Any]]
    figures: dict[str, Any]
    environment: dict[str, Any]
    rows_found: int
    rows_wanted: int | None

    @property
    def is_complete(self) -> bool:
        """No row that was asked for is missing, as far as the run tells."""
        return self.rows_wanted is None or self.rows_found >= self.rows_wanted


def load(path) -> list[dict[str, Any]]:
    """The rows of a run as flat dicts.

    Raises:
        RunError: it is no run, or a file of it is damaged.
    """
    return [flat(row) for row in read(path).rows]


def flat(row, before="") -> dict[str, Any]:
    """A nested dict as one of depth one: {"a": {"b": 1}} is {"a.b": 1}."""
    found = {}
    for name, value in row.items():
        name = f"{before}{name}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def read(path) -> Run:
    """The Run in a directory or results file; RunError if there is none."""
    path = pathlib.Path(path)
    if path.is_dir() and (path / "config.json").exists():
        return _of_directory(path)
    file = path / "results.json" if path.is_dir() else path
    return _of_file(path, record.read_json(file))


# -- run directories -------------------------------------------------------------------


def _of_directory(path):
    flags = record.read_json(path / "config.json")
    figures = _read_if_there(path / "summary.json")
    inputs = _read_if_there(path / "inputs.json")
    if (path / "results.jsonl").exists():
        rows = record.load(path)[1]
        found = len(rows)
    else:  # texts left out: the totals of each mode are what there is
        rows = [
            {"mode": mode} | figures[mode]["total"]
            for mode in _MODES
            if mode in figures
        ]
        found = sum(row["num_requests"] for row in rows)
    name = figures.get("experiment") or inputs.get("launcher")
    name = name or ("study" if "study" in flags else "generate")
    wanted = figures.get("rows_wanted")
    if name == "study":
        found, wanted = _counts_of_study(flags, flags | inputs, rows)
    elif name == "generate" and wanted is None:
        wanted = len(_MODES) * _num_prompts(flags, inputs)
    environment = record.read_json(path / "environment.json")
    return Run(path, name, flags, rows, figures, environment, found, wanted)


_MODES = ("plain", "speculative")


def _read_if_there(path):
    return record.read_json(path) if path.exists() else {}


def _num_prompts(flags, inputs):
    """Prompts of a run of `generate` that does not count its rows."""
    if "prompts" in inputs:
        return len(inputs["prompts"])
    prompts = load_prompts(flags["prompts"], chat=True)
    return len(prompts[: flags["num_prompts"] or None])


def _counts_of_study(flags, sizes, rows):
    """(found, wanted) of a study: of the modes, decoding and replay, that were run.

    All rows of the study are wanted, also those that a command left out.
    """
    cache = {name: sizes.get(name, value) for name, value in _CACHE.items()}
    study, _ = load_study(flags["study"])
    wanted, _ = split(lambda row: row.for_model(**cache), study.rows)
    found = [as_row(row) for row in rows]
    modes = {row.mode for row in found} or {row.mode for row in wanted}
    wanted = [row for row in wanted if row.mode in modes]
    return sum(row in found for row in wanted), len(wanted)


# -- results files ---------------------------------------------------------------------


def _of_file(path, data):
    rows, figures = _rows_of_file(data)
    flags, environment = data.get("flags", {}), _environment(data)
    found, wanted = _counts_of_file(flags, rows)
    module = re.search(r"-m \w+\.(\w+)", environment["command"])
    name = module[1] if module else ""
    return Run(path, name, flags, rows, figures, environment, found, wanted)


def _environment(data):
    """The environment of a results file; those of the benchmark hold less of it."""
    # Only files that the benchmark wrote name an implementation.
    command = "python -m pallas_kernels.bench" if "impl" in data else ""
    found = data.get("environment", {"command": command})
    device = found.get("device") or data.get("device")
    return {"devices": [device], "backend": "", "command": ""} | found


def _rows_of_file(data):
    """(rows, figures): rows stand under other names in files of other commands."""
    rest = {k: v for k, v in data.items() if k not in ("environment", "flags")}
    rest = rest.pop("metrics", {}) | rest.pop("summary", {}) | rest
    if "runs" in data:  # throughput, offload
        runs = rest.pop("runs").items()
        rows = [
            {"mode": mode, "repeat": repeat} | run
            for mode, found in runs
            for repeat, run in enumerate(found)
        ]
        return rows, rest
    if "accepted_drafts" in data:  # train_eagle
        found = rest.pop("accepted_drafts").items()
        rows = [{"proposer": name, "accepted_drafts": v} for name, v in found]
        return rows, rest
    if "cases" in data:  # the benchmark of kernels
        rows = [{"case": name} | v for name, v in rest.pop("cases").items()]
        return rows, rest
    if "loads" in data:  # aligned_probe
        parts = ("products", "dense", "loads")
        rows = [{"part": part} | row for part in parts for row in rest.pop(part)]
        return rows, rest
    return rest.pop("rows", []), rest


def _counts_of_file(flags, rows):
    """(found, wanted) by the flags of a results file; wanted None if they say nothing.

    No command writes such files any more, but for the probes.
    """
    found = len(rows)
    if "lags" in flags:  # lossless
        return found, len(flags["lags"]) * len(flags["page_sizes"])
    if "policies" in flags:  # simulate
        return found, len(flags["policies"])
    if "slots" in flags:  # speedup_map
        return found, _points_of_map(flags)
    if "measure" in flags:  # train_eagle
        return found, len(flags["measure"])
    if "repeats" in flags and "trace_steps" in flags:  # throughput
        return found, 2 * flags["repeats"]
    if "rivals" in flags:  # offload
        return found, 2 * flags["repeats"] + 2 * flags["rivals"]
    if "contexts" in flags and "load" in flags:  # step_time
        return sum(len(r["ms_per_step"]) for r in rows), 2 * len(flags["contexts"])
    if "dispatch_ms" in flags:  # host_cost
        return found, len(flags["num_requests"])
    if "product_rows" in flags:  # aligned_probe
        products = {row["rows"] for row in rows if row["part"] == "products"}
        loads = [row for row in rows if "speedups" in row]
        wanted = len(flags["product_rows"]) + len(flags["loads"])
        return len(products) + len(loads), wanted
    if "acceptor" in flags:  # acceptance
        return found, len(flags["rows"])
    if "num_prompts" in flags:  # divergence
        return found, flags["num_prompts"] or None
    return found, None


def _points_of_map(flags):
    """Points of a map of speed-ups that its pool can hold."""
    load, points = LOADS[flags["load"]], 0
    for slots in map(int, flags["slots"]):
        of_slots = dataclasses.replace(
            load,
            model=flags["model"] or load.model,
            num_slots=slots,
            num_requests=slots,
        )
        choices = [int(k) for k in flags["choices"]]
        points += sum(
            made_up.fits(of_slots, choices, int(n), flags["kv_gib"] * 2**30)
            for n in flags["lengths"]
        )
    return points
