"""What an experiment is, and the one main that runs them all.

An experiment is a subclass of `Experiment` in a module of its name. It declares

* `claim`, one sentence that its figures may bear out or not;
* `Config`, a frozen record of options (`experiments.options`): each field is a flag;
* `SMOKE`, what `--smoke` changes in it, so that everything runs within seconds;
* `rows()`, what is wanted: dicts of JSON types that tell the rows apart;
* `measure(row)`, what is found, again of JSON types;
* `describe(records)`, the figures of all rows together;
* `figure(axes, summary, records)`, a picture of them, if there is one.

Its constructor checks all that can be known before the work, loads the model and
raises ValueError. `run` does the rest, the same for all: it writes a run directory
(`experiments.record`) with config, inputs and environment, a line of results.jsonl for
each row as it comes, and summary.json with `rows_wanted` and `rows_found`. `--resume`
measures the rows that are missing. Only when none is, are the figures described: a
part of a table says nothing of a claim. A row that fails stops no other
(failures.jsonl, and the exit status). `experiments.reader.load` reads every run.
Several processes share a run by `--part 1/3 --output A`, `--part 2/3 --output B`, ...;
the one that comes last, or `--resume`, takes over what the others found: `--take B,C`.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import sys
import time
import traceback

from experiments import launch, options, record, signals

_ALL_ROWS = options.RunOptions()


class Experiment:
    """Base of the experiments; see the module's docstring.

    Attributes:
        name: of its module.
        config: a `Config`.
        is_smoke: of a run with `--smoke`.
        model: the Model, None if there is none.
        directory: the RunDirectory while rows are measured; takes what is no record.
        parts: what else the records follow from: token ids or text by name.
    """

    name: str
    claim: str
    Config: type[options.Options]
    SMOKE: dict = {}
    figure = None
    model = None
    directory = None

    def __init_subclass__(cls):
        if "name" not in vars(cls):
            cls.name = pathlib.Path(sys.modules[cls.__module__].__file__).stem

    def __init__(self, config, *, is_smoke=False):
        self.config, self.is_smoke = config, is_smoke
        self.parts = {}

    def rows(self) -> list[dict]:
        """The rows wanted, in the order of worth."""
        raise NotImplementedError

    def measure(self, row: dict) -> dict:
        """What is found for a row."""
        raise NotImplementedError

    def group(self, row: dict) -> str:
        """Rows of one group stay together in one `--part`."""
        return json.dumps(row)

    def check(self, directory) -> None:
        """ValueError if a run directory holds what this run cannot have written."""
        del directory

    def measure_all(self, rows):
        """Yield (row, what is found, or the exception if it failed) for every row.

        Rows that are measured together have a method of their own.
        """
        for row in rows:
            start = time.perf_counter()
            try:
                found = self.measure(row)
            except Exception as error:  # whatever it is, the others are worth having
                yield row, error
                continue
            yield row, found | {"wall_time_s": time.perf_counter() - start}

    def describe(self, records) -> dict:
        """The figures of all rows together, JSON types."""
        del records
        return {}

    def fault(self, records) -> str:
        """Why the command must fail, "" if nothing is wrong."""
        del records
        return ""

    def text(self, described, records) -> str:
        """What a finished run prints: a line for every figure that is one value."""
        del records
        plain = {k: v for k, v in described.items() if not isinstance(v, dict | list)}
        return "\n".join(f"{name:32s} {value}" for name, value in plain.items())

    def headline(self, found) -> str:
        """The figures of a row that are one value, for the terminal; "" for no line."""
        plain = {k: v for k, v in found.items() if isinstance(v, int | float)}
        return ", ".join(f"{name} {value:.4g}" for name, value in plain.items())

    def inputs(self) -> dict:
        """What a resumed run must have beside its flags, see `fingerprint`."""
        if self.model is None:
            return {"launcher": self.name}
        from experiments import fingerprint
        from sparsespec_jax import sizes

        impl = sizes.resolve_impl(getattr(self.config, "impl", None) or None)
        return fingerprint.of_run(self.name, self.model, impl=impl, **self.parts)


def run(kind) -> None:
    """The main of the module of an experiment."""
    module = sys.modules["__main__"]
    module.__doc__ = f"Claim: {kind.claim}.\n\n{module.__doc__}"  # what --help prints
    options.define(kind.Config)
    launch.run(functools.partial(_main, kind), options.RunOptions)


def _main(kind, how):
    with launch.checking():
        small = kind.SMOKE if how.smoke else {}
        experiment, directory = prepare(kind, options.parse(kind.Config, small), how)
    with directory:
        wrong = measure(experiment, directory, how)
    if wrong:
        sys.exit(wrong)


def prepare(kind, config, how):
    """(experiment, its open RunDirectory); `how` is a RunOptions.

    Raises:
        ValueError: something does not fit; nothing was written then.
    """
    if how.resume and not how.output:
        raise ValueError("--resume needs the --output of the run")
    output = how.output or time.strftime(f"runs/{kind.name}-%Y%m%d-%H%M%S")
    if pathlib.Path(output).suffix in (".json", ".jsonl"):
        raise ValueError(f"--output names a run directory, no file; got {output!r}")
    _index_of(how.part)
    recorded = config.recorded() | ({"smoke": True} if how.smoke else {})
    again = dict(config=recorded, resume=how.resume)
    record.check(output, inputs={"launcher": kind.name}, **again)
    for path in how.take:
        record.check(path, config=recorded, inputs={"launcher": kind.name}, resume=True)
    if how.resume:
        signals.resumable("add --resume to go on")
    experiment = kind(config, is_smoke=how.smoke)
    inputs = experiment.inputs()
    directory = record.RunDirectory(output, inputs=inputs, **again)
    experiment.check(directory)
    for path in how.take:
        with record.RunDirectory(
            path, config=recorded, inputs=inputs, resume=True
        ) as other:
            directory.take(other, missing_of(directory.records, experiment.rows()))
    where = "" if how.output else f" --output {output}"
    signals.resumable(f"add --resume{where} to go on")
    return experiment, directory


def measure(experiment, directory, how=_ALL_ROWS) -> str:
    """Measure the rows that `directory` lacks; why the command must fail, or "".

    `how` is the RunOptions.
    """
    rows = experiment.rows()
    missing = missing_of(directory.records, part_of(rows, how.part, experiment.group))
    summarise = functools.partial(_write_summary, experiment, directory, rows)
    if missing:
        environment = record.describe_environment()
        if how.commit:
            environment["commit"] = how.commit
        directory.write_environment(environment)
        summarise({})
    else:
        print(f"{directory.path} is finished: nothing to measure", file=sys.stderr)
    with signals.at_end(lambda: summarise({})):
        num_failed = _measure(experiment, directory, missing, len(rows))
    records = records_of(directory.records, rows)
    described = experiment.describe(records) if len(records) == len(rows) else {}
    summarise(described)
    print(f"rows found: {len(records)} of {len(rows)} wanted")
    print(f"Results: {directory.path}")
    if described:
        print(experiment.text(described, records), flush=True)
    if num_failed:
        return f"{num_failed} rows failed: see failures.jsonl"
    return experiment.fault(records)


def part_of(rows, part, group):
    """The rows of part "i/n", each `group` in one part; all rows for None.

    Raises:
        ValueError: not i/n with 1 <= i <= n.
    """
    index, count = _index_of(part)
    places = {name: i for i, name in enumerate(dict.fromkeys(map(group, rows)))}
    return [row for row in rows if places[group(row)] % count == index]


def _index_of(part):
    """(index from 0, number of parts)."""
    index, _, count = (part or "1/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part is i/n with 1 <= i <= n, got {part!r}")
    return int(index) - 1, int(count)


def _measure(experiment, directory, missing, num_rows):
    """Measure and record these rows; how many failed."""
    num_found, num_failed = len(directory.records), 0
    experiment.directory = directory
    for row, found in experiment.measure_all(missing):
        if not isinstance(found, Exception):
            found = _as_read_back(found)
        if isinstance(found, Exception):
            num_failed += 1
            note_failure(directory, row, found)
            continue
        directory.append(row | {"session": directory.session} | found)
        num_found += 1
        if line := experiment.headline(found):
            print(f"[{num_found} of {num_rows}] {json.dumps(row)} {line}", flush=True)
    return num_failed


def _as_read_back(found):
    """What a file gives back, or a ValueError: NaN is no figure."""
    try:
        return json.loads(json.dumps(found, allow_nan=False))
    except ValueError as error:
        return error


def _write_summary(experiment, directory, rows, described):
    """Write summary.json: the claim, the counts, and the figures of a complete run."""
    found = records_of(directory.records, rows)
    head = {"experiment": experiment.name, "claim": experiment.claim}
    counts = {"rows_wanted": len(rows), "rows_found": len(found)}
    directory.write_summary(head | counts | described)


def records_of(records, rows):
    """The records of `rows` that are there, in the order of the rows."""
    key = _key_of(rows)
    found = {key(record): record for record in records}
    return [found[key(row)] for row in rows if key(row) in found]


def missing_of(records, rows):
    """The rows of which there is no record."""
    key = _key_of(rows)
    found = {key(record) for record in records}
    return [row for row in rows if key(row) not in found]


def _key_of(rows):
    """What tells records of these rows apart, as a function of a row or record."""
    names = sorted({name for row in rows for name in row})
    return lambda row: json.dumps([row.get(name) for name in names])


def note_failure(directory, row, error):
    """Say on stderr and in failures.jsonl why a row was not measured."""
    text = "".join(traceback.format_exception(error))
    print(f"failed: {row}\n{text}", file=sys.stderr, flush=True)
    with signals.deferred(), open(directory.path / "failures.jsonl", "ab") as file:
        file.write(json.dumps({"row": row, "error": text[-4000:]}).encode() + b"\n")


def of_module(name: str):
    """The Experiment that a module of experiments declares."""
    module = importlib.import_module(f"experiments.{name}")
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Experiment)
        and value.__module__ == module.__name__
    )
    return kind
