"""Ctrl-C and SIGTERM end launchers in one line, at any moment, and lose nothing."""

import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments import experiment, generate, models, record
from experiments.config import GenerateConfig
from sparsespec_jax import Model, save_checkpoint
from sparsespec_jax.models.transformer import init_params

STARTING = "interrupted while starting; nothing was done"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Process:
    """A command whose output can be watched while it runs."""

    def __init__(self, folder, *arguments, before=()):
        """Start Python with these arguments, its output going to files in `folder`."""
        folder.mkdir(exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        command = [*before, sys.executable, *arguments]
        with open(self.files[0], "wb") as out, open(self.files[1], "wb") as error:
            self.process = subprocess.Popen(command, stdout=out, stderr=error)

    def wait_for(self, happened):
        """Until `happened()`; the process must not end before."""
        deadline = time.monotonic() + 200
        while not happened():
            assert not self.has_ended(), self.files[1].read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self

    def has_ended(self):
        """The process is gone."""
        return self.process.poll() is not None

    def is_importing(self):
        """Python has begun to load what a launcher needs."""
        maps = pathlib.Path(f"/proc/{self.process.pid}/maps").read_text()
        return "/numpy/" in maps

    def ends(self, number, *lines):
        """The last line on stderr is one of these, the status that of the signal."""
        status = self.process.wait(timeout=120)
        error = self.files[1].read_text()
        assert status == STATUS[number] and "Traceback" not in error, error
        assert error.endswith("\n") and error.rstrip("\n").split("\n")[-1] in lines

    def ends_by(self, number, *lines):
        """Send a signal; see `ends`."""
        self.process.send_signal(number)
        self.ends(number, *lines)


# -- the handler ---------------------------------------------------------------------

BEGIN = """
import hashlib, os, signal, sys, time
from experiments import signals
signals.install()
signals.begin()
def tell(line):
    print(line, flush=True)
"""


@pytest.fixture
def python(tmp_path):
    """Start Python code behind BEGIN, and wait until it says that it is ready."""

    def start(code, before=()):
        process = Process(tmp_path / "p", "-c", BEGIN + code, before=before)
        return process.wait_for(lambda: b"ready\n" in process.files[0].read_bytes())

    return start


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_ends_the_process_from_anywhere(python, number):
    """Where an exception is swallowed, too, and with what was printed."""
    process = python("""
class Swallowing:
    def __del__(self):
        tell("ready")
        print("last words", end="")
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
Swallowing()
""")
    process.ends_by(number, "interrupted; nothing was kept")
    assert process.files[0].read_text() == "ready\nlast words"


def test_a_block_that_is_deferred_runs_to_its_end(python):
    process = python("""
signals.kept("a.json")
signals.kept("b.json")
signals.kept("a.json")
with signals.deferred():
    with signals.deferred():
        tell("ready")
        time.sleep(0.5)
    tell("whole")
tell("too late")
""")
    line = "interrupted; what was done so far is in a.json, b.json"
    process.ends_by(signal.SIGINT, line)
    assert process.files[0].read_text() == "ready\nwhole\n"


def test_the_way_out_is_gone_once_whatever_comes(python):
    """Innermost first; more signals and errors on the way change nothing."""
    process = python("""
def slow():
    tell("inner")
    time.sleep(0.7)
def broken():
    raise OSError("disk full")
signals.resumable("add --resume to go on")
with signals.at_end(lambda: tell("never")):
    pass
with signals.at_end(lambda: tell("outer")), signals.at_end(broken):
    with signals.at_end(slow):
        tell("ready")
        time.sleep(60)
""")
    for _ in range(4):
        process.process.send_signal(signal.SIGINT)
        time.sleep(0.25)
    process.ends(
        signal.SIGINT,
        "interrupted: add --resume to go on (OSError on the way out: disk full)",
    )
    assert process.files[0].read_text() == "ready\ninner\nouter\n"


def test_a_second_signal_ends_what_cannot_hear(python):
    """As a compilation, which runs outside of Python and knows no signals."""
    process = python("""
with signals.at_end(lambda: tell("never")):
    tell("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
""")
    for _ in range(2):  # both at once are one
        process.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.process.poll() is None
    process.ends_by(signal.SIGTERM, "interrupted; nothing was kept")
    assert process.files[0].read_text() == "ready\n"


def test_signals_that_are_to_be_ignored_are(python):
    """As `nohup` and a shell's background jobs ask for."""
    process = python(
        "tell('ready')\nos.kill(os.getpid(), signal.SIGINT)\ntell('done')\n",
        before=("sh", "-c", "trap '' INT; exec \"$@\"", "sh"),
    )
    assert process.process.wait(timeout=60) == 0
    assert process.files[0].read_text() == "ready\ndone\n"


def test_after_the_work_the_system_ends_the_process(python):
    process = python("signals.uninstall()\ntell('ready')\ntime.sleep(60)\n")
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(timeout=60) == -signal.SIGINT
    assert process.files[1].read_text() == ""


# -- launchers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, contexts and prompts."""
    folder = tmp_path_factory.mktemp("interrupts")
    config = dataclasses.replace(models.TINY, num_layers=1)
    params = init_params(config, seed=0)
    model = Model(name="small", config=config, params=params, tokenizer=None)
    save_checkpoint(model, folder / "model")
    lines = [json.dumps({"token_ids": [1 + i, 2, 3]}) for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    contexts = [[i % 97 for i in range(start, start + 60)] for start in (3, 50)]
    (folder / "contexts.json").write_text(json.dumps(contexts))
    return folder


def launched(folder, name, *options):
    return Process(folder / name, "-m", f"experiments.{name}", *options)


FILES = pathlib.Path(generate.__file__).parent.glob("*.py")
RUNS = re.compile(r"^    (launch\.run\(main|experiment\.run\()", re.MULTILINE)
LAUNCHERS = sorted(file.stem for file in FILES if RUNS.search(file.read_text()))


def test_all_launchers_end_in_one_line_while_they_start(tmp_path):
    """At once, in the seconds of importing jax."""
    numbers, tested = itertools.cycle([signal.SIGINT, signal.SIGTERM]), set()
    said = []
    for name, number in zip(LAUNCHERS, numbers, strict=False):
        process = launched(tmp_path, name)
        while not (process.is_importing() or process.has_ended()):
            time.sleep(0.005)
        if process.has_ended():  # it imports nothing that takes time
            continue
        process.ends_by(number, STARTING, "interrupted; nothing was kept")
        said.append(process.files[1].read_text())
        tested.add(name)
    assert all(text.count("\n") == 1 for text in said) and f"{STARTING}\n" in said
    assert tested >= {"generate", "acceptance", "study", "throughput", "simulate"}


def tokens_of(path):
    """Token ids by mode and prompt; each is there once."""
    _, records = record.load(path)
    found = {(r["mode"], r["index"]): r["token_ids"] for r in records}
    assert len(found) == len(records)
    return found


def test_generate_interrupted_at_many_moments_gives_the_same_tokens(folder, tmp_path):
    options = dict(
        model=str(folder / "model"), prompts=str(folder / "prompts.jsonl"),
        max_tokens=300, temperature=1.0, num_slots=2, page_size=4, prefill_chunk=8,
        num_draft_tokens=3,
    )  # fmt: skip
    config, path = GenerateConfig(**options), tmp_path / "run"
    of_run = dict(config=config.recorded(), inputs={}, resume=False)
    with record.RunDirectory(tmp_path / "whole", **of_run) as directory:
        assert experiment.measure(generate.Generate(config), directory) == ""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += [f"--output={path}", "--journal_seconds=60"]

    def start(*more):
        return launched(tmp_path, "generate", *arguments, *more)

    # While it compiles: the first one waits, the second one does not.
    process = start()
    process.wait_for(lambda: b"plain:" in process.files[1].read_bytes())
    process.process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    process.process.send_signal(signal.SIGINT)
    process.ends(signal.SIGINT, "interrupted: add --resume to go on")
    # While it decodes, before a journal is due; and twice in a row.
    for mode, number in (("plain", signal.SIGINT), ("speculative", signal.SIGTERM)):
        process = start("--resume")
        process.wait_for(lambda: any(key[0] == mode for key in tokens_of(path)))  # noqa: B023
        time.sleep(0.15)  # for the next requests to begin
        process.process.send_signal(number)
        process.process.send_signal(number)
        process.ends(number, "interrupted: add --resume to go on")
        entries = (path / "journal.jsonl").read_bytes().split(b"\n")
        assert entries[-1] == b"" and json.loads(entries[-2])["mode"] == mode
    process = start("--resume")
    assert process.process.wait(timeout=120) == 0, process.files[1].read_text()
    assert tokens_of(path) == tokens_of(tmp_path / "whole")
    _, records = record.load(path)
    assert all(len(r["logprobs"]) == len(r["token_ids"]) for r in records)
    assert len(list(path.glob("environment*.json"))) >= 3


def test_others_say_what_they_leave(folder, tmp_path):
    out = tmp_path / "out"
    processes = {
        # Rows are written as they come; this many take longer than we wait.
        "acceptance": (
            f"--model={folder / 'model'}", f"--contexts={folder / 'contexts.json'}",
            "--rows=" + ",".join(f"window:0.{i}" for i in range(100, 400)),
            f"--output={out}", "--max_tokens=30", "--num_draft_tokens=2",
        ),
        "study": ("--study=policies", "--smoke", f"--output={tmp_path / 'study'}"),
    }  # fmt: skip
    started = {name: launched(tmp_path, name, *o) for name, o in processes.items()}
    kept = tmp_path / "study" / "environment.json"
    started["study"].wait_for(kept.exists)
    line = "interrupted: add --resume to go on"
    started["study"].ends_by(signal.SIGTERM, line)
    results = out / "results.jsonl"
    has_rows = started["acceptance"].wait_for(
        lambda: results.exists() and results.stat().st_size > 0
    )
    has_rows.ends_by(signal.SIGINT, line)
    summary = json.loads((out / "summary.json").read_text())
    num_rows = len(record.load(out)[1])
    assert (summary["rows_found"], summary["rows_wanted"]) == (num_rows, 300)
    assert 0 < num_rows < 300
    assert not list(tmp_path.rglob("*.tmp"))
