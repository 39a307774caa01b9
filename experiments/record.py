"""A run directory: config.json, environment.json and two append-only files.

Every record of results.jsonl is flushed and synced before the next request is reported,
so a killed run keeps all finished requests; journal.jsonl holds what unfinished ones
have emitted, synced whenever the caller likes. A line that was being written when the
process died has no newline and is dropped when the run is resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "sparsespec-jax")


class RunError(ValueError):
    """A run directory cannot be created or resumed; the message says why."""


class RunDirectory(contextlib.AbstractContextManager):
    """An open run directory, locked against a second process.

    Attributes:
        path: the directory.
        records: finished records in file order, earlier sessions first.
        journal: entries about unfinished requests, in file order.
        session: 0 for the process that created the run, 1 for the first resume, ...
    """

    def __init__(self, path, *, config: dict, resume: bool):
        """Create the directory, or reopen it if `resume`.

        Raises:
            RunError: results exist and `resume` is false; nothing is there to resume;
                the config differs from the recorded one; a record is damaged; or
                another process holds the directory.
        """
        self.path = pathlib.Path(path)
        results, config_path = self.path / "results.jsonl", self.path / "config.json"
        check(path, config=config, resume=resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = open(results, "a+b")
        except OSError as error:
            raise RunError(f"output_dir {self.path}: {error.strerror}") from None
        try:
            self._lock()
            check(path, config=config, resume=resume)  # now nobody else can change it
            self.records = _recover(self._file, results)
            self._journal_file = open(self.path / "journal.jsonl", "a+b")
            if not (resume and config_path.exists()):
                self._journal_file.truncate(0)  # of a run that got nowhere
            self.journal = _recover(self._journal_file, self.path / "journal.jsonl")
            if not resume or not config_path.exists():
                for old in self.path.glob("environment*.json"):
                    old.unlink()
                _write_json(config_path, config)
            self.session = len(list(self.path.glob("environment*.json")))
        except BaseException:
            self._file.close()
            raise

    def write_environment(self, environment: dict) -> None:
        """Write what this session runs on: environment.json, or one per resume."""
        suffix = f".resume{self.session}" if self.session else ""
        _write_json(self.path / f"environment{suffix}.json", environment)

    def append(self, record: dict) -> None:
        """Add one record; it survives the process once this returns."""
        _append(self._file, [record])
        self.records.append(record)

    def append_to_journal(self, entries: list[dict]) -> None:
        """Add entries about unfinished requests; they survive once this returns."""
        if entries:
            _append(self._journal_file, entries)
            self.journal.extend(entries)

    def write_summary(self, summary: dict) -> None:
        """Write summary.json, the totals over all records."""
        _write_json(self.path / "summary.json", summary)

    def __exit__(self, *exc_info):
        self._file.close()
        self._journal_file.close()

    def _lock(self):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path} is in use by another process") from None


def check(path, *, config: dict, resume: bool) -> None:
    """Raise RunError if a run with `config` could not start or resume at `path`.

    A directory without a finished request may be started anew: nothing is lost.
    """
    path = pathlib.Path(path)
    results, config_path = path / "results.jsonl", path / "config.json"
    has_results = results.exists() and results.stat().st_size > 0
    if resume and not path.is_dir():
        raise RunError(f"--resume: there is no run at {path}")
    if resume and has_results and not config_path.exists():
        raise RunError(f"--resume: {path} has results but no config.json")
    if has_results and not resume:
        raise RunError(
            f"{path} already holds a run: add --resume to continue it, or name "
            "another --output_dir"
        )
    if resume and config_path.exists():
        config = json.loads(json.dumps(config))  # as it would be read back
        _check_same_config(_read_json(config_path), config, config_path)


def load(path) -> tuple[dict, list[dict]]:
    """The config and the complete records of a run directory, for analysis."""
    path = pathlib.Path(path)
    data = (path / "results.jsonl").read_bytes()
    records, _ = _parse(data, path / "results.jsonl")
    return _read_json(path / "config.json"), records


def describe_environment() -> dict:
    """Versions, machine, devices, command and commit of this process.

    Imports jax, so that it is the one place where a run's device is recorded.
    """
    import jax

    devices = jax.devices()
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "packages": {name: _version(name) for name in _PACKAGES},
        **_git_state(),
    }


def results_header(own_flags, *, commit: str | None) -> dict:
    """Environment and flags for a results file; `commit` where git cannot say it."""
    environment = describe_environment()
    if commit:
        environment["commit"] = commit
    values = {flag.name: flag.value for flag in own_flags}
    return {"environment": environment, "flags": values}


def write_results(path, results: dict) -> None:
    """Write a results file, its folder included, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, results)


def _check_same_config(recorded, config, path):
    names = sorted(set(recorded) | set(config))
    changed = [n for n in names if recorded.get(n) != config.get(n)]
    if changed:
        lines = [f"{n} was {recorded.get(n)!r}, now {config.get(n)!r}" for n in changed]
        raise RunError(
            f"--resume: the flags differ from {path}: {'; '.join(lines)}. Resume with "
            "the recorded values, or name another --output_dir"
        )


def _append(file, records):
    """Write one line per record and wait until the disk has them."""
    for record in records:
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        file.write(line.encode())
    file.flush()
    os.fsync(file.fileno())


def _recover(file, path):
    """Parse all records and cut off a torn last line, in memory and on disk."""
    file.seek(0)
    records, complete_bytes = _parse(file.read(), path)
    file.truncate(complete_bytes)
    file.seek(0, os.SEEK_END)
    return records


def _parse(data, path):
    """Records of whole lines and the number of bytes they take."""
    complete = data.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number} is damaged: {error}") from None
    return records, complete


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None


def _write_json(path, value):
    """Write whole or not at all: a kill leaves the old file or the new one."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _git_state():
    """Commit of the working copy this file is in, and whether it was changed."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*args):
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    try:
        commit = git("rev-parse", "HEAD").stdout.strip()
        status = git("status", "--porcelain").stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status.strip())}
