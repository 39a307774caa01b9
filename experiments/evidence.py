"""What of experiments/results may support a sentence, and what may not.

A file or run directory is evidence if one command made it, from a clean commit, and all
rows that it was asked for are there. An entry is a file or folder right below the
results folder.
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments import reader, record
from experiments.reader import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What an entry says of itself; `run` is None for an input, such as texts."""

    path: pathlib.Path
    run: Run | None

    @property
    def study(self) -> str:
        """Name of the study if it is a run of one, else ""."""
        return self.run.flags["study"] if self.is_of("study") else ""

    @property
    def device(self) -> str:
        """Where it was measured, "" if the entry does not say."""
        return device_of(self.run.environment) if self.run else ""

    @property
    def command(self) -> str:
        """What made it, "" if the entry does not say."""
        return self.run.environment["command"] if self.run else ""

    @property
    def rows(self) -> str:
        """Rows "found of wanted", a question mark where the entry does not tell."""
        if not self.run:
            return "-"
        wanted = self.run.rows_wanted
        return f"{self.run.rows_found} of {'?' if wanted is None else wanted}"

    def is_of(self, experiment) -> bool:
        """Whether the experiment of that name made it."""
        return bool(self.run) and self.run.experiment == experiment

    def why_not(self) -> str:
        """Why no sentence may lean on the entry; "" if one may."""
        if not self.command:
            return "does not say which command made it"
        if self.run.flags.get("smoke"):
            return "a smoke run"
        if self.run.flags.get("mode", "both") != "both" and self.is_of("generate"):
            return "one mode only: nothing to compare with"
        if not self.run.is_complete:
            return f"incomplete: {self.rows} rows"
        return "changed working copy" if self.run.environment.get("dirty") else ""

    def content(self) -> dict:
        """What a judge of `claims` takes: flags, rows, and the figures beside them."""
        return self.run.figures | {"flags": self.run.flags, "rows": self.run.rows}


def read(path) -> Entry:
    """The Entry of a results file or run directory."""
    path = pathlib.Path(path)
    is_input = path.is_file() and isinstance(
        record.read_json(path, of=(dict, list)), list
    )
    return Entry(path=path, run=None if is_input else reader.read(path))


def entries(results) -> dict[str, Entry]:
    """The results files and run directories in a folder, by name."""
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
