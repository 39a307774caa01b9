"""Studies: what they measure is right by hand, resumes, and runs from the shell."""

import ast
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import contexts as contexts_lib
from experiments import (
    experiment,
    figures,
    join_studies,
    measure,
    record,
    replay,
    study,
)
from experiments.models import tiny_model as make_tiny_model
from experiments.study_bench import Bench, Setting, without_budget
from experiments.study_config import (
    Row,
    Study,
    as_json,
    as_row,
    grid,
    load_study,
    smoke_rows,
    split,
    study_names,
)
from sparsespec_jax import Policy, save_checkpoint
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.policies.base import SelectionOptions
from sparsespec_jax.policies.select import POLICIES

OWN_POLICY = """
import jax.numpy as jnp
from sparsespec_jax import Policy


def oldest(view, options):
    counts = jnp.minimum(view.budgets, view.lengths)
    place = jnp.arange(options.cap, dtype=jnp.int32)[None, None]
    return jnp.broadcast_to(place, (counts.size, 1, options.cap)), counts[:, None]


MINE = Policy("oldest", (), oldest)
"""


@pytest.fixture
def own_policy(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_POLICY)
    return f"{path}:MINE"


# -- replay -------------------------------------------------------------------------

K, LENGTH, ROWS = 3, 64, 27  # six cycles of four and three rows of drafts


@pytest.fixture(scope="module")
def recording(tiny_model):
    tokens = jax.random.randint(jax.random.key(1), (LENGTH,), 0, 97)
    return replay.record_text(
        tiny_model.config, tiny_model.params, tokens, LENGTH - ROWS, num_rows=ROWS
    )


def replayed(model, recording, name, *, budget_ratio=0.15, hindsight=False, **changes):
    row = Row(num_draft_tokens=K, budget_ratio=budget_ratio)
    policy = POLICIES[name]
    selection = SelectionOptions(
        cap=LENGTH, per_layer=False, num_recent=0, num_sinks=1, impl="reference"
    )
    return replay.replay(
        model,
        recording,
        policy=policy,
        options=replay.ReplayOptions(K, "all", selection, hindsight),
        speculation=row.speculation(policy),
        temperatures=(0.65,),
        num_cycles=6,
        **changes,
    )


def test_a_recording_is_the_dense_run(tiny_model, recording):
    config, params = tiny_model.config, tiny_model.params
    tokens = jax.random.randint(jax.random.key(1), (LENGTH,), 0, 97)
    hidden, _ = model_lib.forward(
        config, params, tokens, jnp.arange(LENGTH), model_lib.causal_attend,
        (None,) * config.num_layers,
    )  # fmt: skip
    expected = model_lib.logits(config, params, hidden[-ROWS:])
    np.testing.assert_allclose(recording.logits, expected, atol=1e-5)
    np.testing.assert_array_equal(recording.tokens, tokens[-ROWS:])


def test_a_dense_draft_overlaps_fully(tiny_model, recording):
    found = replayed(tiny_model, recording, "full", budget_ratio=1.0)
    for name in ("overlap", "agreement", "recall"):
        np.testing.assert_allclose(found[name], 1.0, atol=1e-5)
    assert replay.summarise(found)["expected_accepted"] == pytest.approx(K, abs=1e-4)


def test_recall_by_hand(tiny_model, recording):
    """One number of the window policy from the recorded queries and keys alone."""
    found = replayed(tiny_model, recording, "window")
    start = LENGTH - ROWS  # of the first cycle; its first draft query is row K + 1
    query = np.asarray(recording.queries)[1, K + 1, 2:4]  # KV head 1 of layer 1
    keys = np.asarray(recording.keys)[1, 1]
    logits = query @ keys.T / np.sqrt(keys.shape[-1])
    logits[:, start + K + 2 :] = -np.inf
    prob = np.exp(logits - logits.max(1, keepdims=True))
    prob = (prob / prob.sum(1, keepdims=True)).mean(0)
    count = int(np.ceil(0.15 * start))
    chosen = [0, *range(start - count + 1, start)]
    expected = prob[chosen].sum() / prob[:start].sum()
    assert found["recall"][0, 1, 1, 0] == pytest.approx(expected, rel=1e-4)
    best = np.sort(prob[:start])[::-1][:count].sum() / prob[:start].sum()
    assert found["recall_oracle"][0, 1, 1, 0] == pytest.approx(best, rel=1e-4)


def test_the_ladder_is_ordered(tiny_model, recording):
    found = {
        name: replayed(tiny_model, recording, name)
        for name in ("oracle", "pillar", "random")
    }
    later = replayed(tiny_model, recording, "pillar", hindsight=True)
    oracle = found["oracle"]
    np.testing.assert_allclose(oracle["recall"], oracle["recall_oracle"], rtol=1e-4)
    np.testing.assert_allclose(later["recall"], later["recall_hindsight"], rtol=1e-4)
    heads = oracle["recall_query_head_oracle"]
    assert (heads >= oracle["recall_oracle"] - 1e-5).all()
    means = [
        x["recall"].mean() for x in (oracle, later, found["pillar"], found["random"])
    ]
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == 4


@pytest.mark.parametrize("name", ["h2o", "pillar_churn", "pillar_anchors", "top_p"])
def test_replay_runs_policies_that_remember_or_share(tiny_model, recording, name):
    found = replayed(tiny_model, recording, name, budget_ratio=0.3)
    if name == "pillar_anchors":  # both layers use the lower one's set
        np.testing.assert_array_equal(found["churn"][:, 0], found["churn"][:, 1])
    if name == "pillar_churn":
        # A quarter, rounded up, and what the growing budget adds.
        count = np.floor(found["count"][1:])
        free = replayed(tiny_model, recording, "pillar", budget_ratio=0.3)
        limit = (np.ceil(0.25 * count) + 2)[..., :1].max() / count.min()
        assert found["churn"].max() <= limit < free["churn"].max()
    if name == "top_p":
        assert len(np.unique(found["count"])) > 1


# -- figures over contexts ------------------------------------------------------------


def test_intervals_cover_the_mean_and_shrink():
    rng = np.random.default_rng(3)
    few = measure.mean_and_error(rng.normal(4, 1, 10))
    many = measure.mean_and_error(rng.normal(4, 1, 1000))
    for found in (few, many):
        low, high = found["interval"]
        assert low < found["mean"] < high
        assert high - low == pytest.approx(4 * found["standard_error"], rel=0.3)
    assert many["standard_error"] < few["standard_error"] / 3
    assert measure.mean_and_error([]) is None


def test_conditional_acceptance_by_hand():
    metrics = RequestMetrics(max_draft_tokens=3, accepted_histogram=[2, 4, 0, 2])
    assert measure.conditional_acceptance(metrics) == [6 / 8, 2 / 6, 1.0]
    none = RequestMetrics(max_draft_tokens=2, accepted_histogram=[5, 0, 0])
    assert measure.conditional_acceptance(none) == [0.0, None]


def test_score_shares_by_hand():
    shape = dict(num_rows=9, group_size=4, head_dim=128, kv_bits=16)
    share = {n: measure.score_share(p, **shape) for n, p in POLICIES.items()}
    assert share["pillar"] == 9 * 4 / 128
    assert share["vegas"] == 2 * 4 / 128
    assert share["pillar_anchors"] == share["pillar"] / 2
    assert share["quest"] == share["pillar_last"] == 0.5
    assert share["oracle"] == 4.0  # K once in each of eight draft steps
    assert share["window"] == share["random"] == 0
    # 16 channels of 4 bits, and two 16-bit bounds per page of 128, against K and V.
    assert share["index"] == 8 * 16 * (4 + 32 / 128) / (2 * 128 * 16)
    wide = measure.score_share(POLICIES["index"], **shape | {"kv_bits": 32})
    assert wide == share["index"] / 2


# -- studies --------------------------------------------------------------------------


@pytest.mark.parametrize("name", study_names())
def test_every_study_loads_and_says_what_to_expect(name):
    found, header = load_study(name)
    for word in ("Claim:", "Command:", "Expected", "Cost:"):
        assert word in header
    assert f"--study {name}" in header
    fields = {f.name for f in dataclasses.fields(Row)}
    assert {found.x, found.series} <= fields
    assert len(set(found.rows)) == len(found.rows)
    for row in found.rows:
        assert row.policy == replay.HINDSIGHT or row.policy in POLICIES


def test_a_grid_changes_its_last_field_fastest():
    rows = grid(num_draft_tokens=(2, 4), policy=("pillar", "window"))
    found = [(row.num_draft_tokens, row.policy) for row in rows]
    assert found == [(2, "pillar"), (2, "window"), (4, "pillar"), (4, "window")]


def test_no_study_of_another_name():
    with pytest.raises(ValueError, match="study must be one of .*'ladder'.*'lader'"):
        load_study("lader")


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="mode must be one of"):
        Row(mode="decoded")
    with pytest.raises(ValueError, match="budget_ratio"):
        Row(budget_ratio=0.0)


@pytest.mark.parametrize(
    ("head_dim", "kv_bits", "index", "index_2bit"),
    [
        (64, 16, [0.0168, 0.0668], [0.0305, 0.0805]),  # SmolLM2 in bfloat16
        (128, 16, [0.0334, 0.0834], [0.0402, 0.0902]),  # Qwen3-8B
        (128, 32, [0.0417, 0.0917], [0.0451, 0.0951]),
    ],
)
def test_equal_bytes_are_those_of_the_model(head_dim, kv_bits, index, index_2bit):
    """16 channels of 4 or 2 bits, and two 16-bit bounds per page of 128 keys."""
    rows = [r for r in load_study("equal_bytes")[0].rows if r.less_index]
    found = {}
    for row in rows:
        row = row.for_model(head_dim=head_dim, kv_bits=kv_bits)
        assert not row.less_index
        found.setdefault((row.mode, row.policy), []).append(row.budget_ratio)
    for mode in ("decode", "replay"):
        assert found[mode, "index"] == index
        assert found[mode, "index_2bit"] == index_2bit
    bits = 16 * (4 + 32 / 128)
    share = bits / (2 * head_dim * kv_bits)
    assert index[0] == pytest.approx(0.05 - share, abs=1e-4)


def test_an_index_larger_than_the_budget_is_refused():
    row = Row(policy="index", less_index=True)
    with pytest.raises(ValueError, match="of heads of 16 x 32 bits, budget_ratio is"):
        row.for_model(head_dim=16, kv_bits=32)
    with pytest.raises(ValueError, match="policy 'pillar' reads no index"):
        Row(less_index=True)


def test_bits_of_the_cache_follow_the_weights(tiny_model):
    assert measure.kv_bits(tiny_model) == 32
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.params)
    assert measure.kv_bits(dataclasses.replace(tiny_model, params=params)) == 16


def test_rows_that_cannot_be_measured_are_told_before_the_work():
    """Too short a context for a replay is no replay from its first token on."""
    short = Row(mode="replay", num_draft_tokens=2, contexts=(0, 50))
    rows = [short, Row(num_draft_tokens=2), Row(contexts=(500, 1000))]
    bench = small_bench(rows)
    bench.contexts[1] = [5, 6, 7]
    possible, impossible = split(bench.check, rows)
    assert possible == rows[1:2] and [row for row, _ in impossible] == [short, rows[2]]
    assert "context 1 has 3 tokens, a replay of 2 drafts needs 4" in impossible[0][1]
    assert "no context has a length in [500, 1000)" in impossible[1][1]
    bench.contexts[1].append(8)
    assert bench.check(short) == short
    assert bench.num_engines == 0


def small_bench(rows):
    setting = Setting(max_tokens=19, num_slots=2, page_size=4)
    contexts = contexts_lib.smoke_contexts()
    return Bench(make_tiny_model(), contexts, setting, POLICIES, rows)


class Rows(study.OnContexts):
    """A study of the rows that it is given."""

    name = "study"
    claim = "none"

    def __init__(self, rows, bench=None):
        experiment.Experiment.__init__(self, Setting())
        self.bench, self.impossible = bench or small_bench(rows), []
        self.possible = rows

    def describe(self, records):
        return {}


def run_rows(directory, rows, bench=None):
    """What is wrong after measuring rows into an open run directory."""
    return experiment.measure(Rows(rows, bench), directory)


def test_an_interrupted_study_measures_only_what_is_missing(tmp_path):
    rows = smoke_rows([Row(), Row(policy="window"), Row(mode="replay")])
    with record.RunDirectory(tmp_path, config={}, inputs={}, resume=False) as directory:
        assert run_rows(directory, rows[:2]) == ""
    before = directory.records
    with record.RunDirectory(tmp_path, config={}, inputs={}, resume=True) as directory:
        assert run_rows(directory, rows) == ""
    assert directory.records[:2] == before and len(directory.records) == 3
    assert [r["mode"] for r in directory.records] == [
        "decode", "decode", "replay",
    ]  # fmt: skip
    assert before[0]["identical_contexts"] == 2
    assert 0 < directory.records[2]["recall"]["mean"] < 1


def test_a_row_of_a_cascade_tells_steps_and_hits():
    rows = smoke_rows([Row(), Row(proposer="cascade")])
    bench = small_bench(rows)
    sparse, cascade = [bench.measure(row) for row in rows]
    assert cascade["identical_contexts"] == cascade["num_contexts"] == 2
    assert sparse["steps_per_cycle"] == 3 and sparse["guess_hit_rate"] is None
    assert cascade["steps_per_cycle"] == 2 and 0 <= cascade["guess_hit_rate"] <= 1


def test_rows_recorded_before_a_field_came_are_known():
    row = Row(policy="window")
    old = {k: v for k, v in as_json(row).items() if k != "draft_steps"}
    assert as_row(old | {"recall": 1.0}) == row


def test_engines_are_shared_over_budgets():
    rows = [Row(num_draft_tokens=2, budget_ratio=s) for s in (0.1, 0.6)]
    bench = small_bench(rows)
    found = [bench.measure(row) for row in rows]
    assert bench.num_engines == 2  # one more for plain decoding
    accepted = [f["mean_accepted_draft_tokens"]["mean"] for f in found]
    assert accepted[0] < accepted[1]


def test_temperatures_share_a_replay(monkeypatch):
    rows = [
        Row(mode="replay", num_draft_tokens=2, temperature=t, text_temperature=0.65)
        for t in (0.65, 0.0)
    ]
    bench, calls, run = small_bench(rows), [], replay.replay

    def noted(*args, **options):
        calls.append(options["temperatures"])
        return run(*args, **options)

    monkeypatch.setattr(replay, "replay", noted)
    together = [bench.measure(row) for row in rows]
    assert set(calls) == {(0.0, 0.65)} and len(calls) == len(bench.contexts)
    for row, found in zip(rows, together, strict=True):
        alone = small_bench([row]).measure(row)
        assert alone["overlap"] == found["overlap"]
        assert alone["expected_accepted"] == found["expected_accepted"]
    assert together[0]["overlap"] != together[1]["overlap"]


def test_a_differing_text_is_reported(tmp_path):
    rows = smoke_rows([Row(policy="window")])
    bench = small_bench(rows)
    bench._plain = lambda temperature: [(1,) * 20, (2,) * 20]
    bench._not_looping = lambda chosen, temperature: chosen
    with record.RunDirectory(tmp_path, config={}, inputs={}, resume=False) as directory:
        assert run_rows(directory, rows, bench) == "tokens differ from plain decoding"


def test_a_failing_row_stops_no_other(tmp_path, capsys):
    def broken(view, options):
        raise RuntimeError("out of ideas")

    rows = smoke_rows([Row(policy="broken"), Row(policy="window")])
    bench = small_bench(rows)
    bench.policies = POLICIES | {"broken": Policy("broken", (), broken)}
    with record.RunDirectory(tmp_path, config={}, inputs={}, resume=False) as directory:
        assert run_rows(directory, rows, bench) == "1 rows failed: see failures.jsonl"
    assert [r["policy"] for r in directory.records] == ["window"]
    failed = json.loads((tmp_path / "failures.jsonl").read_text())
    assert failed["row"]["policy"] == "broken" and "out of ideas" in failed["error"]
    assert "out of ideas" in capsys.readouterr().err


def test_parts_share_out_all_rows_and_split_no_engine():
    rows = list(load_study("everything")[0].rows)
    group = functools.partial(study.PolicyStudy.group, None)
    found = [as_json(row) for row in rows]
    parts = [experiment.part_of(found, f"{i}/3", group) for i in (1, 2, 3)]
    parts = [[as_row(row) for row in part] for part in parts]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, rows))
    for row in parts[0]:
        same = (row.mode, row.policy, without_budget(row.speculation("pillar")))
        for other in parts[1]:
            key = (other.mode, other.policy)
            assert same != (*key, without_budget(other.speculation("pillar")))


def test_continuations_of_a_file_replace_plain_decoding(tmp_path):
    rows = smoke_rows([Row(policy="window")])
    decoded = small_bench(rows)._plain(0.65)
    contexts, path = contexts_lib.smoke_contexts(), tmp_path / "plain.json"
    model, law = make_tiny_model(), dict(max_tokens=20, seed=0)
    texts = {"0.65": [list(t) for t in decoded]}
    inputs = contexts_lib.continuation_inputs(model, contexts, **law)
    path.write_text(json.dumps({"inputs": inputs, "texts": texts}))
    found = contexts_lib.load_continuations(path, contexts, model, **law)
    bench = small_bench(rows)
    bench._continuations = found
    assert bench._plain(0.65) == texts["0.65"]
    assert bench.num_engines == 0  # nothing was decoded for it
    assert bench.measure(rows[0])["identical_contexts"] == 2
    first = contexts_lib.load_continuations(path, contexts[:1], model, **law)
    assert first[0.65] == [texts["0.65"][0]]

    def fails(message, contexts=contexts, **other):
        with pytest.raises(ValueError, match=message):
            contexts_lib.load_continuations(path, contexts, model, **law | other)

    fails("max_tokens was 20, now 21", max_tokens=21)
    changed = [contexts[0], [1, *contexts[1][1:]]]  # of the same length
    fails("context 1 was changed", contexts=changed)
    path.write_text(json.dumps({"context_lengths": [60, 41], "texts": texts}))
    fails("does not say which contexts it continues")


def test_parts_join_to_studies(tmp_path):
    def found(row):
        return as_json(row) | {"recall": {"mean": 1.0}}

    rows = load_study("sweep_k")[0].rows
    for name, of_part in {"a": rows[1:], "b": [Row(policy="vegas"), rows[0]]}.items():
        config = {"num_slots": 3, "study": "everything"}
        inputs = {"launcher": "study", "contexts": ["a1", "b2"], "kernels": name}
        inputs |= {"head_dim": 64, "kv_bits": 16}
        with record.RunDirectory(
            tmp_path / name, config=config, inputs=inputs, resume=False
        ) as part:
            part.write_environment({"command": "python --contexts /tmp/s/c.json --x"})
            for row in of_part:
                part.append(found(row))
    out = tmp_path / "out"
    written = join_studies.join([tmp_path / "a", tmp_path / "b"], out, suffix="gpu")
    assert written["sweep_k"] == (len(rows), len(rows))
    assert written["policies"][0] == 4  # three at k = 8, and vegas
    config, records = record.load(out / "study_sweep_k_gpu")
    assert [as_row(r) for r in records] == list(rows)
    assert config["study"] == "sweep_k"
    summary = json.loads((out / "study_sweep_k_gpu" / "summary.json").read_text())
    assert summary["x"] == "num_draft_tokens"
    assert summary["rows_found"] == summary["rows_wanted"] == len(rows)
    assert not (out / "study_ladder_gpu").exists()
    found = json.loads((out / "study_sweep_k_gpu" / "environment.json").read_text())
    assert found["command"] == "python --contexts c.json --x"
    config = {"num_slots": 3, "seed": 4}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))

    def fails(message):
        parts = [tmp_path / "a", tmp_path / "b"]
        with pytest.raises(ValueError, match=message):
            join_studies.join(parts, tmp_path / "c", suffix="x")

    fails("b is of another run than .*a: seed was None, now 4")
    (tmp_path / "b" / "config.json").write_text(
        (tmp_path / "a" / "config.json").read_text()
    )
    inputs = {"launcher": "study", "contexts": ["a1", "c3"]}
    (tmp_path / "b" / "inputs.json").write_text(json.dumps(inputs))
    fails("context 1 was changed")
    (tmp_path / "b" / "inputs.json").unlink()
    fails("inputs.json: No such file")


def test_ranges_are_checked():
    assert contexts_lib.parse_ranges(["5-10", "10-30"]) == ((5, 10), (10, 30))
    with pytest.raises(ValueError, match="'10-5'"):
        contexts_lib.parse_ranges(["10-5"])


@pytest.fixture
def run_module(parent):
    """Runs a launcher as the shell does."""
    return lambda name, *options: parent.run_module(f"experiments.{name}", *options)


def test_study_figures_and_page_from_the_shell(tmp_path, own_policy, run_module):
    run = tmp_path / "run"
    done = run_module(
        "study", "--study=ablations", f"--output={run}", "--smoke",
        f"--policy_file={own_policy}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, records = record.load(run)
    assert [r["policy"] for r in records][:2] == ["oldest", "pillar"]
    assert all(r["identical_contexts"] == 2 for r in records)
    again = (
        "study", "--study=ablations", f"--output={run}", "--smoke",
        f"--policy_file={own_policy}",
    )  # fmt: skip
    done = run_module(*again, "--resume")
    assert done.returncode == 0, done.stderr
    assert "is finished: nothing to measure" in done.stderr
    pathlib.Path(own_policy.removesuffix(":MINE")).write_text(OWN_POLICY + "# new\n")
    done = run_module(*again, "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "holds a run of other inputs: policy_file was " in done.stderr
    done = run_module("figures", f"--results={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert not (run / "figure.png").exists()  # most rows of the study are missing
    figures.draw(run, study.PolicyStudy)
    assert (run / "figure.png").stat().st_size > 5000
    assert "<svg" in (run / "figure.svg").read_text()
    for name in ("page.md", "page.html"):
        done = run_module(
            "report", f"--results={tmp_path}", f"--output={tmp_path / name}"
        )
        assert done.returncode == 0, done.stderr
        text = (tmp_path / name).read_text()
        assert "run: a smoke run" in text and "arXiv 2512.01278" in text
        assert "oldest" not in text and "figure." not in text


def test_acceptance_measures_a_policy_from_a_file(tmp_path, own_policy, run_module):
    save_checkpoint(make_tiny_model(), tmp_path / "tiny")
    contexts, out = tmp_path / "contexts.json", tmp_path / "out"
    contexts.write_text(json.dumps(contexts_lib.smoke_contexts()))
    done = run_module(
        "acceptance", f"--model={tmp_path / 'tiny'}", f"--contexts={contexts}",
        f"--policy_file={own_policy}", "--rows=oldest:0.2", f"--output={out}",
        "--max_tokens=15", "--num_draft_tokens=2", "--proposer=cascade",
        "--draft_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = record.load(out)[1]
    assert row["policy"] == "oldest" and row["identical_contexts"] == 2
    accepted = row["mean_accepted_draft_tokens"]["mean"]
    assert row["committed_tokens_per_cycle"]["mean"] == pytest.approx(accepted + 1)
    assert row["score_share"] == 0 and row["kv_read_ratio"] > 0
    assert row["steps_per_cycle"] == 2 and 0 <= row["guess_hit_rate"] <= 1


def test_bad_input_ends_before_any_work(tmp_path, run_module):
    out = f"--output={tmp_path / 'x'}"
    for arguments, (status, message) in {
        ("--study=lader", out): (2, "study must be one of"),
        ("--study=ladder", out, "--policy_file=none.py:P"): (2, "FILE.py:NAME"),
    }.items():
        done = run_module("study", *arguments)
        assert done.returncode == status and message in done.stderr + done.stdout
    assert not (tmp_path / "x").exists()


def test_smoke_rows_are_few_and_small():
    rows = smoke_rows(load_study("policies")[0].rows)
    assert len(rows) == 4 and all(r.num_draft_tokens == 2 for r in rows)
    assert isinstance(Study(claim="", x="policy", series="mode", rows=()), Study)


def test_headers_are_docstrings():
    folder = pathlib.Path(study.__file__).parent / "studies"
    for path in folder.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text()))
    assert json.dumps(as_json(Row()))
