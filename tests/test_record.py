"""Run directories: nothing finished is lost or repeated, whatever stops the run."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from experiments import record
from experiments.record import RunDirectory, RunError

INPUTS = {"launcher": "generate", "prompts": ["a1", "b2"], "weights": "c3"}
CONFIG = {"model": "tiny", "stop": ("a", "b"), "seed": 3}


def create(path, num_records=0, config=None):
    with RunDirectory(
        path, config=config or CONFIG, inputs=INPUTS, resume=False
    ) as run:
        run.write_environment({"python": "3"})
        for index in range(num_records):
            run.append({"index": index, "text": "π\n"})


def resume(path, config=None):
    return RunDirectory(path, config=config or CONFIG, inputs=INPUTS, resume=True)


def test_records_come_back_in_order_and_continue(tmp_path):
    create(tmp_path / "run", 2)
    with resume(tmp_path / "run") as run:
        assert [r["index"] for r in run.records] == [0, 1]
        assert run.records[0]["text"] == "π\n"
        assert run.session == 1
        run.append({"index": 2})
    config, records = record.load(tmp_path / "run")
    assert [r["index"] for r in records] == [0, 1, 2]
    assert config == {"model": "tiny", "stop": ["a", "b"], "seed": 3}


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_torn_last_line_is_dropped_at_every_byte(tmp_path, cut):
    create(tmp_path / "run", 2)
    results = tmp_path / "run" / "results.jsonl"
    data = results.read_bytes()
    length = len(data) // 2
    assert data[:length] == data[length:].replace(b'"index": 1', b'"index": 0')
    results.write_bytes(data[:-cut])
    with resume(tmp_path / "run") as run:
        assert [r["index"] for r in run.records] == [0]
        run.append({"index": 1, "text": "again"})
    _, records = record.load(tmp_path / "run")
    assert [(r["index"], r["text"]) for r in records] == [(0, "π\n"), (1, "again")]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    create(tmp_path / "run", 3)
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + b'{"index": 1, "te\n' + lines[2]
    results.write_bytes(damaged)
    with pytest.raises(RunError, match=r"results\.jsonl:2 is damaged"):
        resume(tmp_path / "run")
    assert results.read_bytes() == damaged


def test_another_config_is_refused_with_both_values(tmp_path):
    create(tmp_path / "run", 1)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    with pytest.raises(RunError, match="seed was 3, now 4"):
        resume(tmp_path / "run", CONFIG | {"seed": 4})
    with pytest.raises(RunError, match="extra was None, now 1"):
        resume(tmp_path / "run", CONFIG | {"extra": 1})
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


def test_an_existing_run_is_not_overwritten(tmp_path):
    create(tmp_path / "run", 1)
    with pytest.raises(RunError, match="already holds a run: add --resume"):
        create(tmp_path / "run")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "results.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="already holds a run"):
        create(foreign)
    with pytest.raises(RunError, match="no config.json"):
        resume(foreign)


def test_resuming_nothing_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no run at"):
        resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_killed_before_its_config_was_written_starts_afresh(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.tmp").write_text('{"mod')
    with resume(tmp_path / "run") as run:
        assert run.records == [] and run.session == 0


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="output"):
        create(tmp_path / "file" / "run")


def test_two_processes_cannot_share_a_run(tmp_path):
    create(tmp_path / "run", 1)
    with resume(tmp_path / "run"):
        with pytest.raises(RunError, match="in use by another process"):
            resume(tmp_path / "run")
    resume(tmp_path / "run").__exit__()


def test_nan_is_refused_rather_than_written(tmp_path):
    config = dict(config=CONFIG, inputs=INPUTS)
    with RunDirectory(tmp_path / "run", **config, resume=False) as run:
        with pytest.raises(ValueError):
            run.append({"value": float("nan")})
        run.append({"value": 1})
    _, records = record.load(tmp_path / "run")
    assert records == [{"value": 1}]


def test_a_record_that_cannot_be_written_leaves_no_half_line(tmp_path):
    """The next one must not join it."""
    with RunDirectory(tmp_path / "run", config={}, inputs={}, resume=False) as run:
        run.append({"index": 0})
        size = (tmp_path / "run" / "results.jsonl").stat().st_size
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, old[1]))
        try:
            with pytest.raises(OSError):
                run.append({"index": 1, "text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert (tmp_path / "run" / "results.jsonl").stat().st_size == size
        run.append({"index": 2})
        assert [r["index"] for r in run.records] == [0, 2]
    assert [r["index"] for r in record.load(tmp_path / "run")[1]] == [0, 2]


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"none/results\.jsonl: No such file"):
        record.load(tmp_path / "none")


def test_names_of_files_that_are_no_text_are_recorded(tmp_path):
    path = os.fsdecode(b"caf\xe9.jsonl")
    config = {"prompts": path}
    for resume in (False, True):
        with RunDirectory(
            tmp_path / "run", config=config, inputs={}, resume=resume
        ) as run:
            run.append({"index": 0, "text": path})
    assert record.load(tmp_path / "run")[1][0]["text"] == path


WRITER = """
import sys
from experiments.record import RunDirectory
with RunDirectory(sys.argv[1], config={}, inputs={}, resume=True) as run:
    run.write_environment({})
    for index in range(len(run.records), 100000):
        run.append({"index": index, "text": "x" * 5000})
        print(index, flush=True)
"""


def test_kill_9_keeps_every_reported_record(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    total = 0
    for session in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            reported = [int(process.stdout.readline()) for _ in range(20)]
            os.kill(process.pid, signal.SIGKILL)
            reported += [int(line) for line in process.stdout.read().split()]
        assert reported[0] == total  # nothing repeated, nothing skipped
        with RunDirectory(path, config={}, inputs={}, resume=True) as run:
            assert run.session == session + 1
            indices = [r["index"] for r in run.records]
        assert indices == list(range(len(indices)))
        assert len(indices) >= reported[-1] + 1
        total = len(indices)


def test_environment_of_every_session_is_kept(tmp_path):
    create(tmp_path / "run", 1)
    with resume(tmp_path / "run") as run:
        run.write_environment({"python": "4"})
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {
        "python": "3"
    }
    again = (tmp_path / "run" / "environment.resume1.json").read_text()
    assert json.loads(again) == {"python": "4"}


def test_described_environment_is_json_with_versions_and_device():
    found = json.loads(json.dumps(record.describe_environment(), allow_nan=False))
    assert found["packages"]["jax"].startswith("0.11.")
    assert found["backend"] == "cpu" and found["devices"]
    assert found["commit"] is None or len(found["commit"]) == 40
