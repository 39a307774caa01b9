"""A run directory: config.json, inputs.json, environment.json, two append-only files.

Every record of results.jsonl is flushed and synced before the next request is reported,
so a killed run keeps all finished requests; journal.jsonl holds what unfinished ones
have emitted, synced whenever the caller likes. A line that was being written when the
process died has no newline and is dropped when the run is resumed.

Only the same launcher goes on with a run, with the same flags (config.json) and the
same inputs (inputs.json: hashes of all else that its tokens follow from, see
experiments.fingerprint). Device and versions of packages may be others: each session
writes its own down (environment.json, environment.resume1.json, ...).
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

from experiments import signals

_ENCODE = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
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

    def __init__(self, path, *, config: dict, inputs: dict, resume: bool):
        """Create the directory, or reopen it if `resume`.

        Args:
            path: the directory.
            config: the flags, JSON types.
            inputs: what `fingerprint.of_run` returns.
            resume: go on with the run that is there.

        Raises:
            RunError: a run exists and `resume` is false; nothing is there to resume;
                config or inputs differ from the recorded ones; a record is damaged; or
                another process holds the directory.
        """
        self.path = pathlib.Path(path)
        names = dict(config=config, inputs=inputs, resume=resume)
        check(path, **names)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path / "results.jsonl", "a+b", buffering=0)
        except OSError as error:
            raise RunError(f"output {self.path}: {error.strerror}") from None
        try:
            self._lock()
            check(path, **names)  # now nobody else can change it
            self.records = self._recovered(self._file)
            self._journal_file = open(self.path / "journal.jsonl", "a+b", buffering=0)
            if not (resume and (self.path / "config.json").exists()):
                self._begin(config, inputs)
            self.journal = _recover(self._journal_file)
            self.session = len(list(self.path.glob("environment*.json")))
        except BaseException:
            self._file.close()
            raise

    def _recovered(self, file):
        """What is kept in memory of results.jsonl, without a torn last line."""
        return _recover(file)

    def _begin(self, config, inputs):
        """Clear away what a run left that got nowhere; config.json comes last."""
        self._journal_file.truncate(0)
        for old in ("config.json", "summary.json", "environment*.json"):
            for path in self.path.glob(old):
                path.unlink()
        write_json(self.path / "inputs.json", inputs)
        write_json(self.path / "config.json", config)

    def write_environment(self, environment: dict) -> None:
        """Write what this session runs on: environment.json, or one per resume.

        Says on stderr what differs from the first session and may round differently.
        """
        write_json(self.path / _environment_name(self.session), environment)
        first = self.path / "environment.json"
        if self.session and first.exists():
            before, now = map(_versions, (read_json(first), environment))
            if changed := differences(before, now, now):
                print(f"note: near ties may fall otherwise: {changed}", file=sys.stderr)

    def append(self, record: dict) -> None:
        """Add one record; it survives the process once this returns."""
        with signals.deferred():
            _append(self._file, [record])
            self.records.append(record)

    def append_to_journal(self, entries: list[dict]) -> None:
        """Add entries about unfinished requests; they survive once this returns."""
        if entries:
            with signals.deferred():
                _append(self._journal_file, entries)
                self.journal.extend(entries)

    def take(self, other: RunDirectory, rows: list[dict]) -> None:
        """Take over the records of `rows` and what they were measured on.

        The sessions of the other run follow those of this one; `session` goes behind.
        """
        for number in range(other.session):
            environment = read_json(other.path / _environment_name(number))
            self.write_environment(environment)
            for found in other.records:
                is_wanted = any(row.items() <= found.items() for row in rows)
                if found.get("session") == number and is_wanted:
                    self.append(found | {"session": self.session})
            self.session += 1

    def write_summary(self, summary: dict) -> None:
        """Write summary.json, the totals over all records."""
        write_json(self.path / "summary.json", summary)

    def __exit__(self, *exc_info):
        self._file.close()
        self._journal_file.close()

    def _lock(self):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path} is in use by another process") from None


def _environment_name(session):
    return f"environment.resume{session}.json" if session else "environment.json"


def check(path, *, config: dict, inputs: dict, resume: bool) -> None:
    """Raise RunError if a run could not start or resume at `path`.

    `inputs` may hold only those that are known so far. A directory in which nothing was
    decoded may be started anew: nothing is lost.
    """
    path = pathlib.Path(path)
    files = path / "results.jsonl", path / "journal.jsonl"
    has_tokens = any(f.exists() and f.stat().st_size > 0 for f in files)
    if resume and not path.is_dir():
        raise RunError(f"there is no run at {path} to resume")
    if resume and has_tokens and not (path / "config.json").exists():
        raise RunError(f"{path} has results but no config.json")
    if has_tokens and not resume:
        raise RunError(
            f"{path} already holds a run: add --resume to continue it, or name "
            "another --output"
        )
    if resume and (path / "config.json").exists():
        _check_same(path, config, inputs)


def load(path) -> tuple[dict, list[dict]]:
    """The config and the complete records of a run directory, for analysis.

    Raises:
        RunError: there is no run, or a file of it is damaged.
    """
    path = pathlib.Path(path) / "results.jsonl"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    return read_json(path.with_name("config.json")), _parse(data, path)[0]


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
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with signals.deferred():
        write_json(path, results)
        signals.kept(path)


def _check_same(path, config, inputs):
    """The rule of the module's docstring for a run that is there."""
    wanted = read_json(path / "config.json")
    if not (path / "inputs.json").exists():
        raise RunError(
            f"{path} does not say what its prompts and its model were (no inputs.json: "
            "an earlier version wrote it), so going on could give other tokens: name "
            "another --output"
        )
    recorded = read_json(path / "inputs.json")
    if (other := recorded.get("launcher")) != inputs.get("launcher"):
        raise RunError(
            f"{path} holds a run of experiments.{other}: name another --output"
        )
    config = json.loads(json.dumps(config))  # as it would be read back
    if changed := differences(wanted, config, sorted(wanted.keys() | config.keys())):
        raise RunError(
            f"{path} holds a run with other flags: {changed}. Resume with the recorded "
            "values, or name another --output"
        )
    if changed := differences(recorded, inputs, inputs):
        raise RunError(
            f"{path} holds a run of other inputs: {changed}. Resume with what they "
            "were, or name another --output"
        )


def differences(old, new, names):
    """What of `names` differs between two dicts, in words; "" for nothing.

    Lists hold a hash for each item, in order: the first one that differs is named.
    """
    found = []
    for name in names:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, list) and isinstance(now, list):
            found.append(_first_difference(name, before, now))
        elif isinstance(before, dict) and isinstance(now, dict):
            found.append(differences(before, now, sorted(before.keys() | now.keys())))
        else:
            found.append(f"{name} was {before!r}, now {now!r}")
    return "; ".join(found)


def _first_difference(name: str, old: list, new: list) -> str:
    """How two different lists first differ; `name` is that of their items, plural."""
    place = next(
        (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]),
        min(len(old), len(new)),
    )
    before, after = old[place:], new[place:]
    is_gone = bool(before) and after.count(before[0]) < before.count(before[0])
    is_new = bool(after) and before.count(after[0]) < after.count(after[0])
    if is_gone and is_new:
        how = "was changed"
    elif is_gone or not after:
        how = "was removed"
    elif is_new or not before:
        how = "was added"
    else:
        how = "is in another place (reordered)"
    return f"{name.removesuffix('s')} {place} {how} ({len(old)} then, {len(new)} now)"


def _versions(environment):
    devices = ", ".join(environment.get("devices", ()))
    return {"device": devices} | environment.get("packages", {})


def _append(file, records):
    """Write one line per record and wait until the disk has them: all or none."""
    append_lines(file, map(_ENCODE, records))


def append_lines(file, lines, *, sync=True):
    """Write lines, texts without their ends: all or none; `sync`: wait for the disk."""
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    end = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
        if sync:
            os.fsync(file.fileno())
    except BaseException:
        file.truncate(end)  # whatever comes next must not join half a line
        raise


def _recover(file):
    """Parse all records and cut off a torn last line, in memory and on disk."""
    file.seek(0)
    records, complete_bytes = _parse(file.read(), file.name)
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
        if not isinstance(records[-1], dict):
            raise RunError(f"{path}:{number} is damaged: no object")
        records[-1] = records[-1].pop("row", {}) | records[-1]  # of earlier versions
    return records, complete


def read_json(path, *, of=dict):
    """What is in a JSON file, of this type; RunError if it is missing or damaged."""
    try:
        value = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(value, of):
        raise RunError(f"{path} is damaged: it holds no object")
    return value


def write_json(path, value) -> None:
    """Write a value, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def write_text(path, text: str) -> None:
    """Write whole lines or nothing: a kill leaves the old file or the new one."""
    path = pathlib.Path(path)
    temporary = path.with_suffix(".tmp")
    with signals.deferred():
        with open(temporary, "wb") as file:
            # A name of a file may be no UTF-8; in JSON what replaces it is its escape.
            file.write(text.rstrip("\n").encode("utf-8", "backslashreplace") + b"\n")
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
        for line in pathlib.Path("/proc/cpuinfo").read_text().split("\n"):
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
