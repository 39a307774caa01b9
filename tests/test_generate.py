"""The generate experiment: flags, equality report, interruption and resume."""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments import (
    equality,
    evidence,
    experiment,
    generate,
    models,
    reader,
    record,
)
from experiments.config import GenerateConfig
from sparsespec_jax import Model, decode, save_checkpoint
from sparsespec_jax.host.metrics import DecodeStats, RequestMetrics
from sparsespec_jax.models.transformer import init_params


def tiny(**changes):
    """A config for the tiny model: four requests in two slots."""
    values = dict(
        model="tiny", max_tokens=20, temperature=1.0, num_draft_tokens=3, min_budget=8,
        num_slots=2, page_size=4, prefill_chunk=8,
    )  # fmt: skip
    return GenerateConfig(**(values | changes))


PROMPTS = [[5, 9, 2], list(range(1, 12)), [40], [7, 7, 7, 7, 8]]


def open_run(path, config, *, resume=False, kind=record.RunDirectory):
    inputs = {"launcher": "generate"}
    return kind(path, config=config.recorded(), inputs=inputs, resume=resume)


def run(model, config, directory):
    """(statistics by mode, Comparison) of the prompts decoded into `directory`."""
    made = generate.Generate(config, model=model, prompts=PROMPTS)
    experiment.measure(made, directory)
    return made.results(directory.records)


def run_whole(path, model, config):
    with open_run(path, config) as directory:
        return run(model, config, directory)


# -- config and flags ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_draft_tokens", 0),
        ("num_draft_tokens", 32),
        ("budget_ratio", 0.0),
        ("min_budget", -1),
        ("policy", "pilar"),
        ("acceptor", "threshold"),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("max_tokens", 0),
        ("num_slots", 0),
        ("page_size", 0),
        ("lag", 3),
        ("impl", "cuda"),
        ("dtype", "float16"),
        ("num_prompts", -1),
        ("seed", -1),
        ("n", 0),
        ("stop", ("",)),
        ("mode", "plane"),
        ("kv_policy", "oracle"),
        ("chat_template_kwargs", "[]"),
        ("chat_template_kwargs", "{"),
    ],
)
def test_values_out_of_range_name_the_option(name, value):
    with pytest.raises(ValueError, match=name):
        GenerateConfig(**{name: value})


def test_both_modes_share_the_law_and_differ_in_drafts():
    config = tiny(seed=5)
    assert config.sampling(2).seed == 7
    assert config.speculation("plain").num_draft_tokens == 0
    assert config.speculation("speculative").num_draft_tokens == 3


def command(*arguments):
    return [sys.executable, "-m", "experiments.generate", *arguments]


def test_bad_input_ends_in_one_line_before_any_work(parent, tmp_path):
    done = tmp_path / "done"
    with open_run(done, GenerateConfig()) as directory:
        directory.append({"index": 0})
    cases = {
        ("--lag", "7"): "lag must be an integer in [0, 2], got 7",
        ("--prompts", "none.txt"): "cannot read none.txt",
        ("--model", "no-such-model"): "there is no model at 'no-such-model'",
        ("--output", str(done)): "add --resume",
        ("--output", str(done), "--seed", "1", "--resume"): "seed was 0, now 1",
        ("--resume",): "--resume needs the --output of the run",
        ("stray",): "unexpected argument 'stray'",
        ("--stop=a, b", "--stop="): "stop must hold non-empty strings",
        ("--mode=plane",): "mode must be one of ['plain', 'speculative', 'both']",
    }
    for flags, message in cases.items():
        ended = parent.run_module("experiments.generate", *flags)
        error = ended.stderr
        assert ended.returncode == 2, (flags, error)
        assert ended.stdout == ""
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert message in error


def test_a_pool_beyond_the_memory_leaves_no_run_behind(parent, default_model, tmp_path):
    del default_model  # it is on disk then
    flags = ("--num_slots=1000000", f"--output={tmp_path / 'run'}")
    done = parent.run_module("experiments.generate", *flags)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "lower num_slots" in done.stderr and done.stderr.count("\n") == 1


# -- equality and report ------------------------------------------------------------


def test_comparison_counts_by_position():
    same = equality.compare({0: [1, 2], 1: [3]}, {1: [3], 0: [1, 2]})
    assert (same.num_tokens, same.num_identical) == (3, 3) and same.is_identical
    found = equality.compare({0: [1, 2, 3], 1: [4, 5]}, {0: [1, 9, 3], 1: [4]})
    assert (found.num_tokens, found.num_identical) == (5, 3)
    assert found.divergences == ((0, 1), (1, 1))
    longer = equality.compare({0: [1]}, {0: [1, 2]})
    assert longer.num_identical == 1 and not longer.is_identical
    with pytest.raises(ValueError, match=r"prompts \[1\]"):
        equality.compare({0: [1], 1: [2]}, {0: [1]})


def stats(accepted, wall_time_s=2.0, k=2):
    metrics = RequestMetrics(max_draft_tokens=k, num_prompt_tokens=10)
    for count in accepted:
        metrics.record_verification(num_accepted=count, num_drafted=k)
    metrics.finish(num_output_tokens=1 + sum(accepted) + len(accepted))
    metrics.kv_tokens_read.verify = 50
    return DecodeStats(
        requests=(metrics,),
        num_slots=1,
        num_steps=9,
        wall_time_s=wall_time_s,
        kv_bytes_per_token=1_000_000,
        weight_bytes=1,
    )


def test_closing_lines_state_equality_acceptance_and_traffic():
    spec = stats([2, 1, 0])  # 7 tokens; plain reads 11 + ... + 16 = 81
    same = equality.compare({0: [1] * 7}, {0: [1] * 7})
    lines = equality.closing_lines(same, spec, is_deterministic=True).splitlines()
    assert lines == [
        "7 of 7 tokens identical to plain decoding",
        "acceptance length 2.00 of 3 (1.00 of 2 drafts accepted)",
        f"KV bytes per token: {50 / 81:.3f} of plain decoding",
    ]
    other = equality.compare({0: [1] * 7}, {0: [1] * 6 + [2]})
    lines = equality.closing_lines(other, spec, is_deterministic=True).splitlines()
    assert lines[0] == "NOT LOSSLESS: first differences at prompt 0 token 6"
    assert lines[1].startswith("6 of 7")
    lines = equality.closing_lines(other, spec, is_deterministic=False).splitlines()
    assert "ratio test" in lines[1]


def test_table_states_both_modes_and_the_bound():
    plain, spec = stats([0] * 6, wall_time_s=1.0, k=0), stats([2, 1, 0])
    text = equality.table({"plain": plain, "speculative": spec})
    rows = {line[:34].strip(): line[34:].split() for line in text.splitlines()}
    assert rows["tokens/s"] == ["7.0", "3.5"]
    assert rows["acceptance length"] == ["1.00", "2.00"]
    assert rows["KV read per token"] == ["8.33", "MB", "8.33", "MB"]
    assert rows["speed-up, measured"] == ["1.00", "0.50"]
    assert "by position 1..2: 0.67 0.33" in text
    assert "by drafts accepted, 0..2: 1 1 1" in text
    alone = equality.table({"plain": plain})
    assert (
        "tokens/s" in alone and "speed-up" not in alone and "by position" not in alone
    )
    alone = equality.table({"speculative": spec})
    assert "by position" in alone and "plain" not in alone


def test_texts_of_a_run_in_short():
    item = {"index": 3, "sample": 0, "token_ids": [1] * 9, "finish_reason": "stop"}
    assert equality.one_line(item | {"text": "a\nb"}) == "prompt 3, 9 tokens: 'a\\nb'"
    long = equality.one_line(item | {"text": None, "sample": 2, "token_ids": [7] * 99})
    assert long.startswith("prompt 3 sample 2, 99 tokens: '[7, 7") and len(long) < 110
    samples = equality.compare({(1, 2): [1, 2]}, {(1, 2): [1, 3]})
    spec = stats([2, 1, 0])
    text = equality.closing_lines(samples, spec, is_deterministic=True)
    assert "first differences at prompt 1 sample 2 token 1" in text


# -- runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    """One uninterrupted run and what it returned."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, *run_whole(path, tiny_model, tiny())


def outputs(path):
    """Token ids by (mode, prompt), after checking that no record is repeated."""
    _, records = record.load(path)
    found = {(r["mode"], r["index"]): r["token_ids"] for r in records}
    assert len(found) == len(records) == 2 * len(PROMPTS)
    return found


def test_a_run_is_lossless_and_complete(whole):
    path, found, comparison = whole
    assert comparison.is_identical
    assert comparison.num_tokens == comparison.num_identical == 20 * len(PROMPTS)
    by_mode = outputs(path)
    for index in range(len(PROMPTS)):
        assert by_mode["plain", index] == by_mode["speculative", index]
        assert len(by_mode["plain", index]) == 20
    _, records = record.load(path)
    assert all(r["prompt_token_ids"] == PROMPTS[r["index"]] for r in records)
    assert all(len(r["logprobs"]) == len(r["token_ids"]) for r in records)
    total = found["speculative"].total
    assert total.num_verify_steps > 0 and total.kv_tokens_read.draft > 0


def test_plain_reads_are_those_of_the_byte_model(whole):
    _, found, _ = whole
    total = found["plain"].total
    assert total.kv_tokens_read.decode == total.plain_kv_tokens > 0
    assert found["speculative"].total.plain_kv_tokens == total.plain_kv_tokens


def test_a_run_writes_its_config_environment_and_summary(whole):
    path, found, _ = whole
    assert record.load(path)[0] == json.loads(json.dumps(tiny().recorded()))
    environment = json.loads((path / "environment.json").read_text())
    assert environment["packages"]["jax"]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["comparison"]["num_identical"] == 80
    expected = found["speculative"].total.mean_acceptance_length
    assert summary["speculative"]["total"]["mean_acceptance_length"] == expected


def test_the_page_of_run_directories_names_every_key(whole):
    path, _, _ = whole
    page = pathlib.Path(record.__file__).parents[1] / "docs" / "run_directory.md"
    named = set(re.findall(r"`(\w+(?:\.\w+)?)`", page.read_text()))
    summary = json.loads((path / "summary.json").read_text())
    (first, *_) = record.load(path)[1]
    for keys in (
        first,
        first["metrics"],
        first["metrics"]["kv_tokens_read"],
        summary,
        summary["comparison"],
        summary["plain"],
        [file.name for file in path.iterdir()],
    ):
        assert keys and set(keys) <= named


class Interruption(Exception):
    """Stands for whatever ends a process between two steps."""


class InterruptedDirectory(record.RunDirectory):
    """Ends the run once it holds `max_records` records."""

    max_records = 0

    def append(self, entry):
        super().append(entry)
        if len(self.records) == self.max_records:
            raise Interruption


@pytest.mark.parametrize("num_records", [1, 3, 4, 6])
def test_an_interrupted_run_resumes_to_the_same_result(
    tmp_path, tiny_model, whole, num_records
):
    config, path = tiny(), tmp_path / "run"
    with open_run(path, config, kind=InterruptedDirectory) as directory:
        directory.max_records = num_records
        with pytest.raises(Interruption):
            run(tiny_model, config, directory)
    before = (path / "results.jsonl").read_bytes()
    with open(path / "results.jsonl", "ab") as file:
        file.write(b'{"mode": "speculative", "ind')  # torn by the end of the process
    with open_run(path, config, resume=True) as directory:
        assert len(directory.records) == num_records
        _, comparison = run(tiny_model, config, directory)
    assert comparison.is_identical
    assert (path / "results.jsonl").read_bytes().startswith(before)
    assert outputs(path) == outputs(whole[0])
    _, records = record.load(path)
    assert {r["session"] for r in records} == {0, 1}
    assert (path / "environment.resume1.json").exists()


@pytest.mark.parametrize("seed", range(3))
def test_unfinished_requests_go_on_from_the_journal(
    tmp_path, tiny_model, whole, monkeypatch, seed
):
    """Ended at random steps, four times over; each session adds to the same text."""
    rng, config = random.Random(seed), tiny(journal_seconds=0.0)
    path = tmp_path / "run"
    write, steps_left = generate.Journal.write, 0

    def write_or_end(journal, engine):
        nonlocal steps_left
        write(journal, engine)
        steps_left -= 1
        if steps_left <= 0:
            raise Interruption

    monkeypatch.setattr(generate.Journal, "write", write_or_end)
    for session in range(4):
        steps_left = rng.randint(1, 25)
        with open_run(path, config, resume=session > 0) as directory:
            with pytest.raises(Interruption):
                run(tiny_model, config, directory)
    journal = path / "journal.jsonl"
    assert journal.stat().st_size > 0
    with open(journal, "ab") as file:
        file.write(b'{"mode": "spec')  # torn by the end of the process
    monkeypatch.setattr(generate.Journal, "write", write)
    with open_run(path, config, resume=True) as directory:
        assert directory.journal
        _, comparison = run(tiny_model, config, directory)
    assert comparison.is_identical
    assert outputs(path) == outputs(whole[0])
    _, records = record.load(path)
    for row in records:
        assert row["metrics"]["num_output_tokens"] == len(row["token_ids"])
        assert len(row["logprobs"]) == len(row["token_ids"])


ROWS = [
    {"mode": mode, "index": index, "sample": 0}
    for mode in equality.MODES
    for index in range(len(PROMPTS))
]
ENTRY = {
    "mode": "plain", "index": 1, "sample": 0, "first": 0, "token_ids": [1],
    "logprobs": [0], "params_versions": [[0, 1]], "metrics": RequestMetrics().to_dict(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ENTRY | {"first": 3}], "tokens 0 to 3 of prompt 1 are missing"),
        ([ENTRY, ENTRY], "tokens 1 to 0 of prompt 1 are missing"),
        ([ENTRY, ENTRY | {"index": 4}], "journal.jsonl:2 is damaged: no tokens of a"),
        ([ENTRY | {"mode": "both"}], "journal.jsonl:1 is damaged"),
        ([{"mode": "plain", "index": 1}], "journal.jsonl:1 is damaged"),
    ],
)
def test_a_damaged_journal_is_refused_before_the_work(tmp_path, entries, message):
    with open_run(tmp_path / "run", tiny()) as directory:
        directory.append_to_journal(entries)
        with pytest.raises(record.RunError, match=message):
            generate.check_records(directory, ROWS)


def test_damaged_results_are_refused_before_the_work(tmp_path, whole):
    good = record.load(whole[0])[1]
    for number, changed in enumerate((good[0], {"index": 0}, good[1] | {"index": -1})):
        with open_run(tmp_path / str(number), tiny()) as directory:
            directory.append(good[0])
            generate.check_records(directory, ROWS)
            directory.append(changed)
            with pytest.raises(record.RunError, match=r"results\.jsonl:2 is damaged"):
                generate.check_records(directory, ROWS)


def test_resuming_a_finished_run_decodes_nothing(whole, tiny_model):
    path, _, comparison = whole
    before = (path / "results.jsonl").read_bytes()
    with open_run(path, tiny(), resume=True) as directory:
        found, again = run(tiny_model, tiny(), directory)
    assert again == comparison
    assert (path / "results.jsonl").read_bytes() == before
    assert found["plain"].total.num_output_tokens == 80


def test_sessions_add_up_in_the_statistics():
    metrics = RequestMetrics(num_prompt_tokens=3)
    metrics.finish(num_output_tokens=5)
    rows = [(0, 4, 1.0), (0, 9, 2.5), (1, 6, 0.5)]
    records = [
        {"session": s, "step": n, "elapsed_s": t, "metrics": metrics.to_dict()}
        for s, n, t in rows
    ]
    total = equality.stats_of(records, like=stats([]))
    assert (total.num_steps, total.wall_time_s) == (15, 3.0)
    assert total.tokens_per_s == 5.0


@pytest.mark.parametrize("num_records", [1, 5, 9])
def test_samples_modes_and_keys_of_lines_survive_an_interruption(
    tmp_path, tiny_model, num_records
):
    """Three samples of a prompt, in one mode; each is there once and different."""
    config = tiny(n=3, mode="speculative", journal_seconds=0.0)
    path = tmp_path / "run"
    made = generate.Generate(config, model=tiny_model, prompts=PROMPTS)
    made.lines = [
        dataclasses.replace(line, rest={"id": f"p{i}", "answer": [i]})
        for i, line in enumerate(made.lines)
    ]
    with open_run(path, config, kind=InterruptedDirectory) as directory:
        directory.max_records = num_records
        with pytest.raises(Interruption):
            experiment.measure(made, directory)
    with open_run(path, config, resume=True) as directory:
        assert len({entry["sample"] for entry in directory.journal}) > 1
        made.check(directory)
        assert experiment.measure(made, directory) == ""
        records = directory.records
    found = {(r["index"], r["sample"]): tuple(r["token_ids"]) for r in records}
    assert len(found) == len(records) == 3 * len(PROMPTS) == len(set(found.values()))
    assert all(r["id"] == f"p{r['index']}" for r in records)
    assert all(r["answer"] == [r["index"]] for r in records)
    law = config.sampling(2)
    assert (law.n, law.seed) == (3, 2)
    options = made._options("speculative")
    wanted = decode(
        tiny_model, [PROMPTS[2]], sampling=law, speculation=options[0],
        engine=options[1],
    )  # fmt: skip
    assert [found[2, i] for i in range(3)] == [r.token_ids for r in wanted]
    summary = json.loads((path / "summary.json").read_text())
    assert "comparison" not in summary and "plain" not in summary
    assert summary["speculative"]["total"]["num_requests"] == 12
    assert not reader.read(path).is_complete or evidence.read(path).why_not()


def test_keys_that_a_result_has_of_its_own_are_refused(tmp_path, tiny_model):
    path = tmp_path / "ids.jsonl"
    for name in ("text", "index", "row"):
        path.write_text(json.dumps({"token_ids": [1], name: 0}))
        with pytest.raises(ValueError, match=f"prompt 0 has the key '{name}'.*rename"):
            generate.Generate(tiny(prompts=str(path)), model=tiny_model)


def test_a_prompt_too_long_for_the_model_names_it(tmp_path, tiny_model):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"token_ids": [1]}\n' + json.dumps({"token_ids": [1] * 4090}))
    with pytest.raises(ValueError, match="prompt 1 has 4090 tokens.*--max_tokens"):
        generate.Generate(tiny(prompts=str(path)), model=tiny_model)
    path.write_text('{"token_ids": [97]}\n')
    with pytest.raises(ValueError, match="prompt 0: token id 97 is outside"):
        generate.Generate(tiny(prompts=str(path)), model=tiny_model)


# -- the command --------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A checkpoint of a random model, for commands that load one by path."""
    config = dataclasses.replace(models.TINY, vocab_size=61, num_layers=1)
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    model = Model(
        name="saved", config=config, params=init_params(config, seed=1), tokenizer=None
    )
    save_checkpoint(model, path)
    return path


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, saved_model):
    """A run that was killed, then resumed: (command, path, kept records, process)."""
    folder = tmp_path_factory.mktemp("resumed")
    file, path = folder / "prompts.jsonl", folder / "run"
    lines = [{"token_ids": [1 + i, 2, 3]} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = command(
        *("--model", str(saved_model), "--prompts", str(file)),
        *("--max_tokens", "120", "--num_slots", "2", "--output", str(path)),
    )
    results = path / "results.jsonl"
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = record.load(path)[1]
    done = subprocess.run([*arguments, "--resume"], capture_output=True, text=True)
    return arguments, path, kept, done


def test_kill_9_and_resume_give_every_request_once(resumed):
    _, path, kept, done = resumed
    assert done.returncode == 0, done.stderr
    assert 3 <= len(kept) < 24
    _, records = record.load(path)
    assert records[: len(kept)] == kept
    found = {(r["mode"], r["index"]) for r in records}
    assert len(found) == len(records) == 24
    last = done.stdout.splitlines()[-3:]
    assert last[0] == "1440 of 1440 tokens identical to plain decoding"
    assert last[1].startswith("acceptance length ")
    assert last[2].startswith("KV bytes per token: ")


def kill_at_random_moments(resumed, path, count):
    """Start the resumed fixture's command, killing it `count` times; its outputs."""
    arguments, first, _, _ = resumed
    arguments = [str(path) if word == str(first) else word for word in arguments]
    arguments += ["--journal_seconds", "0.02"]
    rng, killed = random.Random(count), 0
    while killed < count:
        extra = ["--resume"] if path.is_dir() else []
        process = subprocess.Popen([*arguments, *extra], stderr=subprocess.DEVNULL)
        files = [path / "results.jsonl", path / "journal.jsonl"]
        size = sum(f.stat().st_size for f in files if f.exists())
        deadline = time.monotonic() + 120
        # Let each session leave something new, then wait a little longer.
        while sum(f.stat().st_size for f in files if f.exists()) <= size:
            if process.poll() is not None:
                break
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        if process.poll() is not None:
            break  # done before it could be killed
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    done = subprocess.run([*arguments, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, records = record.load(path)
    found = {(r["mode"], r["index"]): r["token_ids"] for r in records}
    assert len(found) == len(records) == 24
    return found, killed


@pytest.mark.parametrize(
    "count", [2, pytest.param(20, marks=pytest.mark.slow, id="twenty")]
)
def test_kill_9_at_random_moments_changes_no_token(tmp_path, resumed, count):
    _, path, _, _ = resumed
    found, killed = kill_at_random_moments(resumed, tmp_path / "run", count)
    assert (tmp_path / "run" / "journal.jsonl").stat().st_size > 0
    assert killed >= min(count, 2)
    _, records = record.load(path)
    assert found == {(r["mode"], r["index"]): r["token_ids"] for r in records}


def test_a_planted_difference_fails_the_command(tmp_path, resumed):
    """The check of equality looks at what was decoded, not at what should be."""
    arguments, path, _, _ = resumed
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    _, rows = record.load(path)
    (row,) = (r for r in rows if r["mode"] == "speculative" and r["index"] == 4)
    row["token_ids"][7] ^= 1
    lines = [json.dumps(r) + "\n" for r in rows]
    (copy / "results.jsonl").write_text("".join(lines))
    arguments = [str(copy) if word == str(path) else word for word in arguments]
    arguments += ["--resume", "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    short = [line for line in done.stdout.splitlines() if line.startswith("prompt ")]
    assert len(short) == 12 and all(len(line) < 110 for line in short)
    assert "NOT LOSSLESS: first differences at prompt 4 token 7" in done.stdout
    assert "1439 of 1440 tokens identical" in done.stdout
    # Nothing was left to do, and that is said.
    assert f"{copy} is finished: nothing to measure\n" in done.stderr
    assert (copy / "results.jsonl").read_text() == "".join(lines)


@pytest.mark.slow
def test_the_default_model_in_small(tmp_path):
    arguments = command(
        *("--num_prompts", "2", "--max_tokens", "24", "--num_draft_tokens", "3"),
        *("--min_budget", "16", "--output", str(tmp_path / "run")),
    )
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "48 of 48 tokens identical" in done.stdout.splitlines()[-3]
