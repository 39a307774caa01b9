"""Experiments: one contract, one main, one place for flags; each runs in small."""

import ast
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import claims, evidence, experiment, figures, reader
from experiments.ablations import tokens_of_passes
from experiments.experiment import Experiment
from experiments.options import Options, RunOptions, make, option
from sparsespec_jax.plan.buffer import StepPlan
from tests.fake_device import make_shape

FOLDER = pathlib.Path(experiment.__file__).parent
README = FOLDER / "README.md"
NAMES = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if re.search(r"^    experiment\.run\(\w+\)$", path.read_text(), re.MULTILINE)
)
# Probes of one device keep flags and files of their own.
COMMON = ("output", "commit", "smoke", "resume", "part", "take")
PROBES = ("row_bits.py",)


def begin(kind, path, **options):
    """(experiment, open run directory, RunOptions) of a smoke run."""
    how = RunOptions(output=str(path), smoke=True, commit="c0ffee", **options)
    return *experiment.prepare(kind, make(kind.Config, kind.SMOKE), how), how


def run_to_end(kind, path, **options):
    """What the command would end with."""
    made, directory, how = begin(kind, path, **options)
    with directory:
        return experiment.measure(made, directory, how)


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """Run directory of the smoke run of an experiment, each made once."""
    folder, made = tmp_path_factory.mktemp("smoke"), {}

    def of(name):
        if name not in made:
            made[name] = folder / name
            assert run_to_end(experiment.of_module(name), made[name]) == ""
        return made[name]

    return of


# -- every experiment ------------------------------------------------------------------


def test_the_experiments_are_found():
    assert len(NAMES) >= 12 and {"generate", "study", "throughput"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_finds_all_rows_that_it_wants(smoked, name):
    path, kind = smoked(name), experiment.of_module(name)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["experiment"] == kind.name == name
    assert summary["rows_found"] == summary["rows_wanted"] > 0
    assert summary["claim"] and "\n" not in summary["claim"] + kind.claim
    assert json.loads((path / "inputs.json").read_text())["launcher"] == name
    assert json.loads((path / "environment.json").read_text())["commit"] == "c0ffee"
    assert not (path / "failures.jsonl").exists()
    lines = (path / "results.jsonl").read_text().splitlines()
    rows = reader.load(path)
    assert len(rows) == len(lines) == summary["rows_found"]
    assert not any(isinstance(value, dict) for row in rows for value in row.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_bears_out_no_claim(smoked, name):
    entry = evidence.read(smoked(name))
    assert entry.run.experiment == name and entry.run.flags["smoke"]
    assert entry.run.is_complete or name == "study"  # whose other rows are missing
    assert entry.why_not() == "a smoke run"


@pytest.mark.parametrize("name", NAMES)
def test_the_claims_of_the_paper_are_judged_by_what_a_run_holds(smoked, name):
    content = evidence.read(smoked(name)).content()
    verdicts = (claims.MET, claims.MISSED, claims.UNDECIDED, claims.NOT_MEASURED, "")
    for _, judges in claims.CLAIMS:
        for whose, judge in judges.items():
            if whose == name:
                verdict, text = judge(content)
                assert verdict in verdicts and text


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_drawn_of_what_was_measured(smoked, name):
    kind = experiment.of_module(name)
    if kind.figure and (picture := figures.draw(smoked(name), kind)):
        assert picture.stat().st_size > 5000
        picture.unlink()
    # Not each has a curve in small, but two policies are a comparison.
    assert name not in ("acceptance", "simulate") or picture


HELP = """
import contextlib, io, json, runpy, sys
from absl import app, flags
app.define_help_flags()
said, usual = {}, set(flags.FLAGS)
for name in sys.argv[1:]:
    sys.argv[1:], out = ["--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module("experiments." + name, run_name="__main__", alter_sys=True)
    said[name] = out.getvalue()
    for flag in set(flags.FLAGS) - usual:
        delattr(flags.FLAGS, flag)
print(json.dumps(said))
"""


def test_help_shows_the_claim_first_and_every_option():
    command = [sys.executable, "-c", HELP, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, text in json.loads(done.stdout).items():
        kind = experiment.of_module(name)
        first, _, rest = text.strip().partition("\n\n")
        assert " ".join(first.split()) == f"Claim: {kind.claim}.", name
        for record in (kind.Config, RunOptions):
            for field in dataclasses.fields(record):
                assert re.search(rf"^  --(\[no\])?{field.name}:", rest, re.MULTILINE)


# -- one place for each thing ----------------------------------------------------------


def flags_defined(path):
    """Calls in a file that define a flag, as source."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("DEFINE_")
    ]


def common_options(path):
    """Options of every run, or the model's help, that a file declares."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, value = node.target.id, node.value
            is_option = isinstance(value, ast.Call) and ast.unparse(value.func) == (
                "option"
            )
            if is_option and name in COMMON:
                found.append(name)
            texts = is_option and [*value.args[1:], *value.keywords]
            if name == "model" and texts:
                found.append(name)
    return found


def sources():
    return [p for p in sorted(FOLDER.rglob("*.py")) if p.name not in PROBES]


def test_flags_are_defined_in_one_file():
    defining = {path.name for path in sources() if flags_defined(path)}
    assert defining == {"options.py"}
    declaring = {path.name: common_options(path) for path in sources()}
    declaring = {name: found for name, found in declaring.items() if found}
    assert declaring == {
        "options.py": ["output", "output", "resume", "smoke", "commit", "part", "take"]
    }


def test_the_check_of_flags_sees_planted_faults(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from absl import flags\nflags.DEFINE_string('output', None, '')\n")
    assert flags_defined(path) == ["flags.DEFINE_string"]
    path.write_text("class C:\n    commit: str = option(None, 'Mine.')\n")
    assert common_options(path) == ["commit"]
    path.write_text("class C:\n    model: str = option('a', 'Mine.')\n")
    assert common_options(path) == ["model"]
    path.write_text("class C:\n    model: str = option('a')\n")
    assert common_options(path) == []


def test_the_command_without_a_name_prints_every_experiment():
    command = [sys.executable, "-m", "experiments"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    blocks = [block.splitlines() for block in done.stdout.split("\n\n")]
    found = {}
    for question, *lines in blocks:
        command, minutes, result = (line.split(None, 1) for line in lines)
        assert question.endswith("?") and [command[0], minutes[0], result[0]] == [
            "command", "minutes", "result"
        ]  # fmt: skip
        found[re.search(r"experiments\.(\w+)", command[1])[1]] = result[1]
        assert "|" not in "".join(lines) and "](" not in "".join(lines)
        for path in re.findall(r"\((experiments/[^)]*)\)", result[1]):
            assert (FOLDER.parent / path).exists(), path
    assert set(found) == set(NAMES) and len(blocks) == len(NAMES)
    done = subprocess.run([*done.args, "stray"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_the_start_page_names_every_experiment_and_tool():
    text = README.read_text()
    mains = {p.stem for p in FOLDER.glob("*.py") if "__main__" in p.read_text()}
    for name in mains - {"experiment"}:
        assert f"experiments.{name}" in text, name
    for name in NAMES:
        assert experiment.of_module(name).claim in text, name


# -- the runner ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareConfig(Options):
    """Numbers."""

    numbers: tuple[int, ...] = option((1, 2, 3), "What to square.", at_least=0)
    note: str = option("", "Changes nothing.", is_recorded=False)


class Square(Experiment):
    """Squares, but none of 2."""

    name = "square"
    claim = "squares are larger"
    Config = SquareConfig
    fails = True

    def rows(self):
        return [{"number": n} for n in self.config.numbers]

    def measure(self, row):
        if self.fails and row["number"] == 2:
            raise RuntimeError("out of ideas")
        return {"square": row["number"] ** 2, "parts": {1: row["number"]}}

    def describe(self, records):
        return {"total": sum(record["square"] for record in records)}

    def fault(self, records):
        return "too small" if any(r["square"] < 1 for r in records) else ""


class Sound(Square):
    """All squares."""

    name = "square"
    fails = False


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def test_a_failing_row_stops_no_other_and_a_part_is_not_described(tmp_path, capsys):
    path = tmp_path / "run"
    assert run_to_end(Square, path) == "1 rows failed: see failures.jsonl"
    head = {"experiment": "square", "claim": "squares are larger"}
    assert summary_of(path) == head | {"rows_wanted": 3, "rows_found": 2}
    failed = json.loads((path / "failures.jsonl").read_text())
    assert failed["row"] == {"number": 2} and "out of ideas" in failed["error"]
    said = capsys.readouterr()
    assert "rows found: 2 of 3 wanted" in said.out and "total" not in said.out
    assert "out of ideas" in said.err
    before = (path / "results.jsonl").read_text()
    assert run_to_end(Sound, path, resume=True) == ""
    assert (path / "results.jsonl").read_text().startswith(before)
    assert summary_of(path)["rows_found"] == 3 and summary_of(path)["total"] == 14
    rows = reader.load(path)
    assert [(r["number"], r["square"], r["parts.1"], r["session"]) for r in rows] == [
        (1, 1, 1, 0), (3, 9, 3, 0), (2, 4, 2, 1),
    ]  # fmt: skip
    assert "total" in capsys.readouterr().out


def test_what_is_no_number_is_no_figure(tmp_path, capsys):
    class Nothing(Sound):
        name = "square"

        def measure(self, row):
            return {"square": float("nan")}

    assert run_to_end(Nothing, tmp_path) == "3 rows failed: see failures.jsonl"
    assert "not JSON compliant" in capsys.readouterr().err


def test_a_finished_run_measures_nothing_again(tmp_path, capsys):
    path = tmp_path / "run"
    run_to_end(Sound, path)
    before = (path / "results.jsonl").read_bytes()
    assert run_to_end(Sound, path, resume=True) == ""
    assert (path / "results.jsonl").read_bytes() == before
    assert "is finished: nothing to measure" in capsys.readouterr().err


def prepared(path, **options):
    values = {n: options.pop(n) for n in ("numbers", "note") if n in options}
    how = RunOptions(output=str(path), **options)
    made, directory = experiment.prepare(Sound, make(SquareConfig, values), how)
    with directory:
        return experiment.measure(made, directory, how)


def test_parts_are_all_rows_and_a_run_takes_them_over(tmp_path, capsys):
    paths = [tmp_path / name for name in "abc"]
    for i, path in enumerate(paths[:2], start=1):
        assert run_to_end(Sound, path, part=f"{i}/3") == ""
        assert summary_of(path)["rows_found"] == 1 and "total" not in summary_of(path)
    found = dict(part="3/3", take=tuple(map(str, paths[:2])))
    assert run_to_end(Sound, paths[2], **found) == ""
    assert summary_of(paths[2])["total"] == 14
    rows = [(r["number"], r["square"], r["session"]) for r in reader.load(paths[2])]
    assert rows == [(1, 1, 0), (2, 4, 1), (3, 9, 2)]
    environments = sorted(path.name for path in paths[2].glob("environment*"))
    assert environments == [
        "environment.json", "environment.resume1.json", "environment.resume2.json",
    ]  # fmt: skip
    # What is there is taken once.
    assert run_to_end(Sound, paths[2], resume=True, take=found["take"]) == ""
    assert len(reader.load(paths[2])) == 3
    with pytest.raises(ValueError, match="--part is i/n with 1 <= i <= n, got '4/3'"):
        begin(Sound, tmp_path / "d", part="4/3")
    with pytest.raises(ValueError, match="holds a run with other flags"):
        prepared(tmp_path / "d", numbers=(4,), take=(str(paths[0]),))
    assert not (tmp_path / "d").exists()


def test_a_run_goes_on_with_what_it_had_only(tmp_path):
    path = tmp_path / "run"
    assert prepared(path, numbers=(0, 1)) == "too small"
    with pytest.raises(ValueError, match="add --resume to continue it"):
        prepared(path)
    with pytest.raises(ValueError, match="number 2 was added"):
        prepared(path, numbers=(0, 1, 2), resume=True)
    with pytest.raises(ValueError, match="smoke was None, now True"):
        prepared(path, numbers=(0, 1), resume=True, smoke=True)
    assert prepared(path, numbers=(0, 1), note="other", resume=True) == "too small"
    with pytest.raises(ValueError, match="names a run directory, no file"):
        prepared(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_a_killed_run_counts_what_is_there(tmp_path):
    """Its summary was written before; the reader goes by the records."""
    made, directory, how = begin(Sound, tmp_path / "run")
    with directory:
        experiment.measure(made, directory, how)
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "results.jsonl").write_text("".join(lines[:2]))
    entry = evidence.read(tmp_path / "run")
    assert (entry.run.rows_found, entry.run.rows_wanted) == (2, 3)
    assert not entry.run.is_complete


# -- options ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded(Options):
    """One field of each kind."""

    needed: str = option(text="Must be there.")
    count: int | None = option(None, "A number.", kind=int, at_least=1, at_most=9)
    names: tuple[str, ...] = option(("a", "b"), "Names.", choices=("a", "b", "c"))
    more: tuple[str, ...] = option((), "Others.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--needed is missing: Must be there"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 10}, "count must be at most 9, got 10"),
        ({"names": ("a", "d")}, "names must be one of .*, got 'd'"),
        ({"names": ()}, "--names is empty: name at least one"),
    ],
)
def test_wrong_options_are_named(values, message):
    values = values and {"needed": "x"} | values
    with pytest.raises(ValueError, match=message):
        make(Bounded, values)


def test_options_that_fit_are_kept():
    made = make(Bounded, {"needed": "x", "names": ("c",)})
    assert made.recorded() == {
        "needed": "x",
        "count": None,
        "names": ("c",),
        "more": (),
    }


# -- the reader of old files -----------------------------------------------------------

RESULTS = FOLDER / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda path: path.name)
def test_rows_of_every_result_are_flat(path):
    if path.name in ("README.md", "contexts_smollm2.json"):
        return
    run, rows = reader.read(path), reader.load(path)
    assert len(rows) == len(run.rows) > 0 and run.rows_found > 0
    assert run.experiment or "row_bits" in path.name
    for row in rows:
        assert not any(isinstance(value, dict) for value in row.values())


def test_old_files_have_the_names_of_new_ones():
    runs = {p.name: reader.load(p) for p in RESULTS.iterdir() if "_h100" in p.name}
    (mode, *_) = runs["throughput_h100_qwen3_8b_64x512x4096.json"]
    assert (mode["mode"], mode["repeat"]) == ("plain", 0) and mode["decode.steps"] > 0
    assert runs["eagle_h100"][0]["proposer"] == "eagle"
    assert runs["eagle_h100"][0]["accepted_drafts.mean"] == pytest.approx(
        1.06, abs=0.01
    )
    study = runs["study_policies_h100"][0]
    assert study["policy"] == "pillar" and study["mean_accepted_draft_tokens.mean"] > 3


def test_what_is_no_run_is_refused(tmp_path):
    for name in ("contexts_smollm2.json", "nowhere"):
        with pytest.raises(ValueError):
            reader.load(RESULTS / name)


def test_tokens_of_the_passes_of_a_step():
    for schedule, expected in (("mixed", [1 + 2 * 4]), ("aligned", [1, 1, 1, 2 * 4])):
        shape = make_shape(slots=5, k=3, pages=40, is_aligned=schedule == "aligned")
        plan = StepPlan.empty(shape, prefill=False)
        plan.views["draft_slots"][:1] = 4
        plan.views["verify_slots"][:2] = 0, 2
        assert tokens_of_passes(plan, 5) == expected
