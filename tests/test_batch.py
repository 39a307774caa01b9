"""Jobs: the same bytes whatever the shards, order and kills; nothing is lost."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import batch, job_cost, job_input, job_rows, models, record
from experiments.decoder import BatchConfig, Decoder
from experiments.job_input import Shard
from sparsespec_jax import SamplingParams, decode

OPTIONS = dict(
    model="tiny", max_tokens=12, max_length=64, num_draft_tokens=3, min_budget=4,
    num_slots=3, page_size=4, prefill_chunk=8, n=2,
)  # fmt: skip
CONFIG = BatchConfig(**OPTIONS)
DAMAGED = {7: '{"token_ids": [1, 2', 11: '{"token_ids": [97]}', 12: '{"text": "a"}'}


def write_prompts(path, count, damaged=DAMAGED):
    rng = random.Random(0)
    lines = []
    for index in range(count):
        ids = [rng.randrange(97) for _ in range(rng.randrange(1, 25))]
        line = json.dumps({"id": f"q{index}", "token_ids": ids, "answer": index})
        lines.append(damaged.get(index, line) + "\n" * (1 + (index == 3)))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def tiny():
    return models.tiny_model()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("job") / "prompts.jsonl", 40)


def job_of(prompts, output, shard="1/1", config=CONFIG, *, model, window=4096, **how):
    options = batch.JobOptions(
        input=str(prompts), output=str(output), shard=shard, window=window
    )
    make = functools.partial(Decoder, model=model, **how)
    return batch.Job(options, config, make_decoder=make)


def run_job(prompts, output, shards=1, config=CONFIG, **how):
    """The merged bytes of a job, its shards run one after the other, the last first."""
    for number in range(shards, 0, -1):
        job = job_of(prompts, output, f"{number}/{shards}", config, **how)
        with job.directory:
            job.run()
    job_rows.merge(output)
    return (pathlib.Path(output) / "results.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(prompts, tiny, tmp_path_factory):
    return run_job(prompts, tmp_path_factory.mktemp("whole"), model=tiny)


def rows_of(data):
    return [json.loads(line) for line in data.splitlines()]


# -- what a row is ---------------------------------------------------------------------


def test_rows_are_what_decode_gives_for_their_seed(whole, prompts, tiny):
    rows = rows_of(whole)
    assert [(r["index"], r["sample"]) for r in rows] == [
        (i, sample) for i in range(40) for sample in range(2)
    ]
    lines = [json.loads(x) for x in prompts.read_text().split("\n") if '"answer"' in x]
    good = [row for row in rows if "error" not in row]
    assert len(good) == 2 * len(lines) == 74
    laws = [
        SamplingParams(temperature=0.65, max_tokens=12, n=2, seed=row["seed"])
        for row in good[::2]
    ]
    wanted = decode(tiny, [line["token_ids"] for line in lines], sampling=laws)
    for row, result, line in zip(
        good, wanted, [x for x in lines for _ in range(2)], strict=True
    ):
        assert row["token_ids"] == list(result.token_ids)
        assert (row["sample"], row["id"]) == (result.sample_index, line["id"])
        assert row["answer"] == line["answer"] and row["text"] is None
        assert row["finish_reason"] == result.finish_reason
        assert row["num_prompt_tokens"] == len(line["token_ids"])
    assert len({row["seed"] for row in good}) == 37


def test_a_damaged_line_has_rows_that_say_why(whole):
    rows = [row for row in rows_of(whole) if "error" in row]
    assert [row["index"] for row in rows] == [7, 7, 11, 11, 12, 12]
    assert all(row["finish_reason"] == "error" for row in rows)
    texts = [row["error"] for row in rows[::2]]
    assert "line 9 is not JSON" in texts[0]  # a blank line stands before it
    assert "token id 97 is outside" in texts[1]
    assert "line 14 must be a string or an object with one of" in texts[2]


def test_columns_that_are_asked_for(prompts, tiny, tmp_path):
    columns = "prompt_token_ids", "token_ids", "logprobs", "prompt_logprobs"
    config = dataclasses.replace(CONFIG, columns=columns, mode="plain", n=1)
    rows = rows_of(run_job(prompts, tmp_path, config=config, model=tiny))
    good = [row for row in rows if "error" not in row]
    for row in good:
        assert len(row["logprobs"]) == len(row["token_ids"])
        assert len(row["prompt_logprobs"]) == len(row["prompt_token_ids"])
        assert row["prompt_logprobs"][0] is None and "text" not in row


# -- shards, order and kills -----------------------------------------------------------


@pytest.mark.parametrize("shards, window", [(2, 1), (5, 4)])
def test_shards_merge_to_the_same_bytes(whole, prompts, tiny, tmp_path, shards, window):
    found = run_job(prompts, tmp_path, shards, model=tiny, window=window)
    assert found == whole
    summary = record.read_json(tmp_path / "summary.json")
    assert summary["rows_found"] == summary["rows_wanted"] == 80
    assert summary["errors"] == 6 and summary["shards"] == shards


class Stop(BaseException):
    """Ends a job in the midst of a step."""


def test_a_file_cut_at_any_byte_is_gone_on_with(whole, prompts, tiny, tmp_path):
    """What a kill leaves: any first bytes of the file, and now and then rows out of
    order, of a prompt one sample and not the other."""
    rng, path = random.Random(0), tmp_path / "shard-1-of-1" / "results.jsonl"
    for cut in range(10):
        job = job_of(prompts, tmp_path, model=tiny)
        left = iter(range(rng.randrange(1, 12)))

        def add(rows, job=job, left=left):
            if next(left, None) is None:
                raise Stop
            type(job.directory).add(job.directory, rows)
            job.directory.flush()

        job.directory.add = add
        with job.directory, pytest.raises(Stop):
            job.run()
        size = path.stat().st_size
        if cut % 2:
            with open(path, "r+b") as file:
                file.truncate(rng.randrange(max(0, size - 400), size + 1))
    assert run_job(prompts, tmp_path, model=tiny) == whole
    sessions = list((tmp_path / "shard-1-of-1").glob("environment*.json"))
    assert len(sessions) == 11


WORKER = """
import sys, time
from experiments import job_cost
from experiments.decoder import BatchConfig
step = job_cost.FakeEngine.step
job_cost.FakeEngine.step = lambda self: time.sleep(0.002) or step(self)
config = BatchConfig(model="tiny", max_tokens=8, num_slots=4, columns=("token_ids",))
job_cost.run_shard(sys.argv[1], "1/1", config)
"""


def killed_at_random(command, path, times, rng, most):
    """Run a command, killing it so many times behind the first new row, then whole."""
    for _ in range(times):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(command)
        while process.poll() is None:
            if path.exists() and path.stat().st_size > before:
                time.sleep(rng.uniform(0, most))
                break
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_a_process_that_is_killed_goes_on(tmp_path):
    """With steps of a clock: SIGKILL, twice, and once more to the end."""
    outputs = [tmp_path / name for name in ("killed", "whole")]
    for output in outputs:
        output.mkdir()
        job_cost.write_input(output / "input.jsonl", 8000, 3)
    paths = [output / "shard-1-of-1" / "results.jsonl" for output in outputs]
    command = [sys.executable, "-c", WORKER, str(outputs[0])]
    killed_at_random(command, paths[0], 2, random.Random(1), 0.8)
    config = BatchConfig(
        model="tiny", max_tokens=8, num_slots=4, columns=("token_ids",)
    )
    job_cost.run_shard(str(outputs[1]), "1/1", config)
    merged = []
    for output in outputs:
        assert job_rows.merge(output)["rows_found"] == 8000
        merged.append((output / "results.jsonl").read_bytes())
    assert merged[0] == merged[1]
    assert len(list(paths[0].parent.glob("environment*.json"))) == 3


# -- what is refused -------------------------------------------------------------------


def test_another_job_in_the_same_place_is_refused(whole, prompts, tiny, tmp_path):
    job = job_of(prompts, tmp_path, model=tiny, make_engine=job_cost.FakeEngine)
    again = functools.partial(job_of, output=tmp_path, model=tiny)
    with job.directory:
        with pytest.raises(record.RunError, match="in use by another process"):
            again(prompts)
        job.run()
    other = dataclasses.replace(CONFIG, temperature=0.5)
    with pytest.raises(record.RunError, match="other flags: temperature was 0.65"):
        again(prompts, config=other)
    changed = write_prompts(tmp_path / "changed.jsonl", 41)
    with pytest.raises(record.RunError, match="other inputs: input was"):
        again(changed)
    finished = again(prompts)  # nothing is decoded: there is no engine
    with finished.directory:
        assert finished.run()["rows_found"] == 80
    path = tmp_path / "shard-1-of-1" / "results.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(record.RunError, match="jsonl:81 is damaged: .* there twice"):
        again(prompts)
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(record.RunError, match="jsonl:1 is damaged: it is no row"):
        again(prompts)


def test_what_cannot_be_merged(prompts, tiny, tmp_path):
    with pytest.raises(record.RunError, match="holds no shard"):
        job_rows.merge(tmp_path)
    how = dict(model=tiny, make_engine=job_cost.FakeEngine)
    job = job_of(prompts, tmp_path, "2/2", **how)
    with job.directory:
        job.run()
    with pytest.raises(record.RunError, match="lacks shard 1/2: run it first"):
        job_rows.merge(tmp_path)
    job_of(prompts, tmp_path, "1/2", **how).directory.__exit__()
    with pytest.raises(record.RunError, match="shard 1/2 is unfinished: start it"):
        job_rows.merge(tmp_path)
    other = dataclasses.replace(CONFIG, seed=3)
    (tmp_path / "shard-1-of-2").rename(tmp_path / "away")
    job_of(prompts, tmp_path, "1/2", other, **how).directory.__exit__()
    with pytest.raises(record.RunError, match="another job than .*: seed was 3, now 0"):
        job_rows.merge(tmp_path)
    (tmp_path / "shard-1-of-2").rename(tmp_path / "shard-1-of-3")
    with pytest.raises(record.RunError, match="holds shards of 2 and of 3"):
        job_rows.merge(tmp_path)


@pytest.mark.parametrize(
    "options, wanted",
    [
        (dict(), "--input is missing"),
        (dict(input="a.txt"), "a.txt must end in .jsonl or .parquet"),
        (dict(input="none.jsonl"), "cannot read none.jsonl"),
        (dict(input="a.jsonl", shard="3/2"), "i/n with 1 <= i <= n, got '3/2'"),
        (dict(input="a.jsonl", shard="2"), "i/n with 1 <= i <= n, got '2'"),
    ],
)
def test_options_that_are_refused(tmp_path, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        batch.Job(batch.JobOptions(output=str(tmp_path / "job"), **options), CONFIG)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "options, wanted",
    [
        (dict(columns=("texts",)), "columns must be one of"),
        (dict(max_tokens=64), "leaves no room for a prompt within max_length=64"),
        (dict(mode="both"), "mode must be one of"),
        (dict(n=0), "n must be at least 1"),
    ],
)
def test_configs_that_are_refused(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        BatchConfig(**OPTIONS | options)


# -- the parts -------------------------------------------------------------------------


def test_lines_that_are_read(tmp_path, monkeypatch):
    """Bytes that are no text, a line without an end, one that is too long; a mark."""
    monkeypatch.setattr(job_input, "_LONGEST", 60)
    path = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf"first"', b'"\xff"', b"", b'"' + b"x" * 200 + b'"']
    path.write_bytes(b"\n".join([*lines, b'{"prompt": "last", "id": 5}']))
    *tasks, count = job_input.read(path, Shard(1, 1), lambda index: (0,))
    assert count == 4 and [task.index for task in tasks] == [0, 1, 2, 3]
    assert tasks[0].line.prompt == "first" and tasks[0].id == 0
    assert "line 2 is not UTF-8" in tasks[1].problem
    assert "line 4 has more than 60 bytes" in tasks[2].problem
    assert tasks[3].line.prompt == "last" and tasks[3].id == 5
    *tasks, count = job_input.read(path, Shard(2, 3), lambda index: (0,))
    assert count == 4 and [task.index for task in tasks] == [1]


def test_seeds_follow_from_the_id():
    seeds = {job_input.seed_of(seed, key) for seed in (0, 1) for key in (1, "1", "a")}
    assert len(seeds) == 6 and max(seeds) < 2**48
    assert job_input.seed_of(0, "a") == job_input.seed_of(0, "a")


def test_places_by_hand():
    """Two samples of every third prompt, from the second one on."""
    places = job_rows.Places(Shard(2, 3), 2)
    assert places.missing(1) == places.missing(4) == (0, 1)
    places.add(4, 1)
    places.add(1, 0)
    assert places.missing(1) == (1,) and places.missing(4) == (0,)
    places.add(1, 1)
    places.add(4, 0)
    assert places.missing(1) == places.missing(4) == () and places.missing(7) == (0, 1)
    assert not places._above and places.count == 4
    for index, sample, wanted in [(1, 0, "twice"), (2, 0, "none of"), (1, 2, "none")]:
        with pytest.raises(ValueError, match=wanted):
            places.add(index, sample)


def test_nobody_runs_further_than_the_window(tiny):
    """Behind a prompt that does not end: memory is that of the window."""

    class Straggling(job_cost.FakeEngine):
        def step(self):
            if len(self._queue) > 1:
                first = self._queue.popleft()
                result = self._result(*self._queue.popleft())
                self._queue.appendleft(first)
                return [result]
            return super().step()

    config = dataclasses.replace(CONFIG, n=1, num_slots=50)
    decoder = Decoder(config, model=tiny, make_engine=Straggling)
    line = job_input.PromptLine([1, 2, 3])
    begun = []

    def tasks():
        for index in range(60):
            begun.append(index)
            yield job_input.Task(index, line, "", (0,))

    order = []
    for rows in decoder.rows(tasks(), window=10):
        order += [row["index"] for row in rows]
        if 0 not in order:
            assert max(begun) <= 10
    assert sorted(order) == list(range(60)) and order[9] == 0


def test_a_sample_left_over_is_decoded_where_the_engine_chooses_k(tiny):
    config = dataclasses.replace(CONFIG, chooses_k=True)
    decoder = Decoder(config, model=tiny, make_engine=job_cost.FakeEngine)
    task = job_input.Task(0, job_input.PromptLine([1, 2, 3]), "", (1,))
    (row,) = [row for rows in decoder.rows([task], window=10) for row in rows]
    assert row["sample"] == 1 and row["finish_reason"] == "length"


def test_a_batch_of_columns_has_the_rows_of_the_job(whole, prompts, tiny):
    """As Ray Data calls it, in another order; without its ids it is refused."""
    lines = [json.loads(x) for x in prompts.read_text().split("\n") if '"answer"' in x]
    lines = lines[5:20][::-1]
    batch_ = {
        "id": np.array([line["id"] for line in lines]),
        "token_ids": np.array([np.array(x["token_ids"]) for x in lines], object),
        "answer": np.array([line["answer"] for line in lines]),
        "chat_template_kwargs": [None] * 15,
    }
    decoder = Decoder(CONFIG, model=tiny)
    found = decoder(batch_)
    wanted = {(r.get("id"), r["sample"]): r for r in rows_of(whole)}
    assert len(found["id"]) == 30
    for place in range(30):
        row = {name: column[place] for name, column in found.items()}
        row["token_ids"] = list(row["token_ids"])
        same = dict(wanted[row["id"], row["sample"]])
        del same["index"]
        assert row == same
    assert decoder({"id": ["a"], "token_ids": [[]]})["error"][0]
    with pytest.raises(ValueError, match="need a column id"):
        decoder({"token_ids": [[1]]})


needs_pyarrow = pytest.mark.skipif(
    not importlib.util.find_spec("pyarrow"), reason="extra `parquet`"
)


@needs_pyarrow
def test_parquet_in_and_out(prompts, tiny, whole, tmp_path):
    """The same rows of a table of prompts; a table of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.loads(x) for x in prompts.read_text().split("\n") if '"answer"' in x]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "prompts.parquet")
    rows = rows_of(run_job(tmp_path / "prompts.parquet", tmp_path / "job", model=tiny))
    wanted = [row for row in rows_of(whole) if "error" not in row]
    for row, same in zip(rows, wanted, strict=True):
        assert row | {"index": 0} == same | {"index": 0}
    (tmp_path / "r.jsonl").write_bytes(whole)
    table = pq.read_table(job_rows.write_parquet(tmp_path / "r.jsonl"))
    assert table.num_rows == 80
    for cells, row in zip(table.to_pylist(), rows_of(whole), strict=True):
        assert cells["token_ids"] == row.get("token_ids")
        assert json.loads(cells["rest"]).get("answer") == row.get("answer")
        assert cells["error"] == row.get("error") and cells["seed"] == row["seed"]


def test_what_needs_pyarrow_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'pyarrow: pip install -e ".\[parquet\]"'):
        job_input.check("a.parquet")


# -- from the shell, and in full -------------------------------------------------------


def command_of(prompts, output, *more, options=OPTIONS):
    flags = [f"--{name}={value}" for name, value in options.items()]
    start = [sys.executable, "-m", "experiments.batch", *flags]
    return [*start, f"--input={prompts}", f"--output={output}", *more]


def test_the_command(whole, prompts, tmp_path):
    """Of one shard, that merges by itself; then what is refused, in one line."""
    done = subprocess.run(
        command_of(prompts, tmp_path), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "shard 1/1: 80 of 80 rows",
        "job: 80 of 80 rows",
        f"Results: {tmp_path}/results.jsonl",
    ]
    assert 'rows have an "error"' in done.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shards_of_a_thousand_requests(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 1000)
    config = dataclasses.replace(CONFIG, n=1)
    found = {
        count: run_job(prompts, tmp_path / str(count), count, config, model=tiny)
        for count in (1, 2, 5)
    }
    assert len(rows_of(found[1])) == 1000
    assert found[1] == found[2] == found[5]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_killed_at_ten_moments(tiny, tmp_path):
    """Real processes with a real engine, by SIGKILL."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 1000)
    config = dataclasses.replace(CONFIG, n=1, max_tokens=40)
    whole = run_job(prompts, tmp_path / "whole", config=config, model=tiny)
    output = tmp_path / "killed"
    command = command_of(prompts, output, options=OPTIONS | dict(n=1, max_tokens=40))
    path = output / "shard-1-of-1" / "results.jsonl"
    killed_at_random(command, path, 10, random.Random(2), 0.3)
    assert (output / "results.jsonl").read_bytes() == whole


RAY = """
import json, sys
import ray
from experiments.decoder import BatchConfig, Decoder
ray.init(num_cpus=4, include_dashboard=False)  # actors take two, reading one
config = BatchConfig(**json.loads(sys.argv[2]))
rows = ray.data.read_json(sys.argv[1]).map_batches(
    Decoder, fn_constructor_args=[config], batch_size=8, concurrency=2
)
with open(sys.argv[3], "w") as file:
    for row in rows.iter_rows():
        file.write(json.dumps(row | {"token_ids": list(map(int, row["token_ids"]))}))
        file.write("\\n")
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="extra `ray`")
def test_a_real_local_ray(whole, prompts, tmp_path):
    """Two actors, small batches: rows of the job, whoever decoded them."""
    lines = [x for x in prompts.read_text().split("\n") if '"answer"' in x]
    paths = [str(tmp_path / name) for name in ("good.jsonl", "rows.jsonl")]
    pathlib.Path(paths[0]).write_text("\n".join(lines))
    root = pathlib.Path(batch.__file__).parents[1]
    command = [sys.executable, "-c", RAY, paths[0], json.dumps(OPTIONS), paths[1]]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(pathlib.Path(paths[1]).read_bytes())
    wanted = {(r["id"], r["sample"]): r for r in rows_of(whole) if "error" not in r}
    assert len(rows) == len(wanted) == 74
    for row in rows:
        same = dict(wanted[row["id"], row["sample"]])
        del same["index"]
        assert row == same
