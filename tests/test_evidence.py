"""What pages may lean on: results that are complete, clean, and listed as they are."""

import json
import pathlib
import re

import pytest

from experiments import claims, evidence, record, report
from experiments.study_config import Row, as_json, load_study

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INPUTS = {"contexts_smollm2.json"}  # texts to measure on, no measurement
# Names of results: paths below results/, and words that end as results are called.
_PATH = re.compile(r"results/([\w./-]*\w)")
_NAME = re.compile(r"(?<![\w/.-])(?:\w+/)*(\w*(?:_h100|_cpu)\w*(?:\.json)?)(?![\w.])")


@pytest.fixture(scope="module")
def found():
    return evidence.entries(RESULTS)


def mentioned(text):
    """Names of results in a page: of entries, or of what looks like one."""
    paths = {path.split("/")[0] for path in _PATH.findall(text)} - {"README.md"}
    return paths | set(_NAME.findall(text))


def faults(text, found):
    """What a page mentions and may not: {name: why}."""
    reasons = {
        name: found[name].why_not() if name in found else "no such entry"
        for name in mentioned(text) - INPUTS
    }
    bare = {n for n in found if re.search(rf"(?<![\w.]){re.escape(n)}", text)}
    reasons |= {name: found[name].why_not() for name in bare - INPUTS}
    return {name: why for name, why in reasons.items() if why}


def claiming(path):
    """A page without commands, and without the lines that say what is no evidence."""
    text = path.read_text().split("\n## Left out\n")[0]
    text = re.sub(r"`python [^`]*`", "", text)
    return "\n".join(
        line for line in text.splitlines() if f"| {claims.NOT_MEASURED} |" not in line
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_lean_on_evidence_only(path, found):
    assert faults(claiming(path), found) == {}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_pages_exist(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    missing = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert missing == []


def test_the_check_of_pages_sees_planted_faults(found):
    assert faults("as `study_policies_h100` says", found) == {
        "study_policies_h100": "changed working copy"
    }
    for text in (
        "[here](../experiments/results/h100_partial/x.json)",
        "`h100_partial/steps_h100_x.json`",
        "`kernels_h100_layer.json`",
        "`host_cost.json`",
        "`study_equal_bytes_cpu`",
    ):
        assert faults(text, found), text
    fine = "`results/kernels_h100.json`, `demo_cpu`, `kv_simulator.json`"
    assert faults(fine, found) == {}


def table_of_results():
    """{entry: (device, rows, evidence)} of experiments/results/README.md."""
    lines = (RESULTS / "README.md").read_text().splitlines()
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x[:3] == "| ["]
    for name, _, what, *_ in rows:
        assert what and re.fullmatch(r"\[(.+)\]\(\1\)", name)
    return {row[0][1:].partition("]")[0]: (row[1], *row[4:]) for row in rows}


def test_the_table_of_results_says_what_the_files_say(found):
    names = {path.name for path in RESULTS.iterdir()} - {"README.md"}
    assert names == found.keys()  # nothing else lies there
    says = {}
    for name, entry in found.items():
        why = "an input" if name in INPUTS else entry.why_not()
        says[name] = (entry.device or "-", entry.rows, f"no: {why}" if why else "yes")
    assert table_of_results() == says


def test_the_index_of_docs_names_every_page():
    text = (ROOT / "docs" / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w+\.md)\)", text))
    assert linked == {p.name for p in PAGES[1:]} - {"README.md"}


def test_the_report_is_the_one_that_its_command_makes():
    page = report.as_markdown(report.collect(RESULTS), ROOT / "docs")
    assert (ROOT / "docs" / "report.md").read_text() == page


def write_study(path, name, rows, *, dirty=False):
    """A run directory of a study with these rows, each accepting 4 drafts."""
    mean = {"mean": 4.0, "standard_error": 0.1, "interval": [3.8, 4.2]}
    environment = {
        "backend": "gpu",
        "devices": ["GPU"],
        "command": f"python -m experiments.study --study {name}",
        "dirty": dirty,
    }
    config = {"study": name, "model": "smollm2", "head_dim": 64, "kv_bits": 16}
    study, _ = load_study(name)
    with record.RunDirectory(
        path, config=config, inputs={"launcher": "study"}, resume=False
    ) as run:
        run.write_environment(environment)
        for row in rows:
            run.append(as_json(row) | {"mean_accepted_draft_tokens": mean})
        run.write_summary(
            {"claim": study.claim, "x": study.x, "series": study.series, "y": study.y}
        )
    (path / "figure.png").write_bytes(b"")


def page_of(folder):
    return report.as_markdown(report.collect(folder), folder)


def test_a_part_of_a_study_makes_no_table(tmp_path):
    rows = load_study("sweep_k")[0].rows
    part = [row for row in rows if row.num_draft_tokens == 8]
    write_study(tmp_path / "study_sweep_k_x", "sweep_k", part)
    page = page_of(tmp_path)
    why = "study_sweep_k_x: incomplete: 3 of 15 rows"
    assert f"at k = 8 (ablation) | not measured | {why} |  | 3 of 15 |" in page
    assert "## study_sweep_k_x" not in page and "figure.png" not in page
    assert why in page.replace("`", "").split("## Left out")[1]


def test_a_whole_study_makes_a_table_and_a_verdict(tmp_path):
    rows = load_study("sweep_k")[0].rows
    write_study(tmp_path / "study_sweep_k_x", "sweep_k", rows)
    page = page_of(tmp_path)
    assert "saturates at k = 8 (ablation) | undecided | [4 +- 0.1 at 2, " in page
    assert "| GPU | 15 of 15 | `python -m experiments.study --study sweep_k` |" in page
    assert "## study_sweep_k_x" in page and "figure.png" in page


def test_a_study_of_one_mode_is_whole_with_the_rows_of_that_mode(tmp_path):
    rows = [r for r in load_study("ablations")[0].rows if r.mode == "replay"]
    write_study(tmp_path / "study_ablations_x", "ablations", rows)
    assert evidence.read(tmp_path / "study_ablations_x").rows == "11 of 11"
    write_study(tmp_path / "study_ablations_y", "ablations", [*rows[1:], Row()])
    assert evidence.read(tmp_path / "study_ablations_y").rows == "11 of 22"


def test_a_changed_working_copy_is_no_evidence(tmp_path):
    rows = load_study("sweep_k")[0].rows
    write_study(tmp_path / "study_sweep_k_x", "sweep_k", rows, dirty=True)
    page = page_of(tmp_path)
    assert "not measured | study_sweep_k_x: changed working copy |" in page
    assert "## study_sweep_k_x" not in page


def test_files_say_how_many_rows_they_wanted(tmp_path):
    environment = {"backend": "gpu", "devices": ["GPU"], "command": "c"}

    def rows_of(flags, **content):
        data = {"environment": environment, "flags": flags, **content}
        (tmp_path / "x.json").write_text(json.dumps(data))
        run = evidence.read(tmp_path / "x.json").run
        return run.rows_found, run.rows_wanted

    pairs = {"lags": ["0", "1", "2"], "page_sizes": ["16", "64"]}
    assert rows_of(pairs, rows=[{}, {}]) == (2, 6)
    assert rows_of({"policies": ["a", "b"]}, rows=[{}]) == (1, 2)
    rows = {"rows": ["a:1", "b:1"], "acceptor": "shared_noise"}
    assert rows_of(rows, rows=[{}]) == (1, 2)
    assert rows_of({"measure": ["eagle"]}, accepted_drafts={"eagle": 1}) == (1, 1)
    offload = {"repeats": 2, "rivals": True}
    assert rows_of(offload, runs={"offload": [{}, {}], "recompute": [{}]}) == (3, 6)
    host = {"dispatch_ms": 2.0, "num_requests": ["2", "4"]}
    assert rows_of(host, rows=[{}]) == (1, 2)
    assert rows_of({"num_prompts": 3}, rows=[{}]) == (1, 3)
    probe = {"product_rows": ["24"], "loads": ["24x9", "8x9"]}
    parts = {"products": [{"rows": 24}] * 2, "dense": [{}], "loads": [{"speedups": 1}]}
    assert rows_of(probe, **parts) == (2, 3)
    whole = {"repeats": 2, "trace_steps": 0}
    runs = {"plain": [{}, {}], "speculative": [{}]}
    assert rows_of(whole, runs=runs) == (3, 4)
    steps = {"load": "x", "contexts": ["1", "2"]}
    assert rows_of(steps, rows=[{"ms_per_step": {"1": 1}}]) == (1, 4)
    points = {
        "load": "qwen3_8b_64x512x4096",
        "model": None,
        "slots": ["8", "128"],
        "lengths": ["256", "32000"],
        "choices": ["0", "8"],
        "kv_gib": 50.0,
    }
    assert rows_of(points, rows=[{}]) == (1, 3)  # 128 x 32,000 do not fit
    assert rows_of({}, rows=[{}]) == (1, None)
    assert evidence.read(tmp_path / "x.json").rows == "1 of ?"


def test_the_page_says_what_other_results_hold(tmp_path):
    environment = {"devices": ["GPU"], "backend": "gpu"}
    mean = {"mean": 0.5, "standard_error": 0.1}
    files = {
        "offload_h100.json": {"metrics": {"offload_over_recompute": 1.25}},
        "host_cost.json": {
            "rows": [
                {
                    "num_requests": 2,
                    "plan_us": 3.4,
                    "commit_us": 5.6,
                    "loop_ms_by_lag": [3.0, 2.25, 2.004],
                }
            ]
        },
        "eagle_h100/results.json": {"accepted_drafts": {"eagle": mean}, "num_texts": 7},
        "throughput_x.json": {
            "metrics": {
                "speedup": 2,
                "speed_of_light": 3,
                "forced_acceptance": None,
                "ar_tokens_per_s": 10.0,
                "spec_tokens_per_s": 7.5,
            },
            "runs": {
                "speculative": [
                    {
                        "device_clock": {
                            "idle_between_steps_share": 0.00375,
                            "window_s": 21.56,
                        }
                    }
                ]
            },
        },
        "speedup_map_x.json": {
            "rows": [
                {"chosen_speedup": 1.0, "chosen_of_best": 1.0},
                {"chosen_speedup": 1.5, "chosen_of_best": 0.98},
            ]
        },
    }
    made_by = {
        "offload_h100.json": "offload",
        "host_cost.json": "host_cost",
        "eagle_h100/results.json": "train_eagle",
        "throughput_x.json": "throughput",
        "speedup_map_x.json": "speedup_map",
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        command = {"command": f"python -m experiments.{made_by[name]} --output x"}
        path.write_text(json.dumps(data | {"environment": environment | command}))
    page = page_of(tmp_path)
    for words in (
        "1.25 times recomputing",
        "2 requests: plan 3 us, commit 6 us, from step to step 3.00, 2.25, 2.00 ms at",
        "eagle 0.5 +- 0.1 (head of 7 texts)",
        "while all slots are busy, byte bound 3.00; 0.75 times in all; device idle "
        "between steps for 0.38 % of 21.6 s",
        "the chosen k makes 1.00 to 1.50 times plain decoding at 2 points, at least "
        "0.98 of the best",
    ):  # fmt: skip
        assert words in page


def test_verdicts():
    def mean(value, error=0.1):
        return {"mean": value, "standard_error": error}

    def pillar(*points):
        rows = [
            {
                "policy": "pillar",
                "budget_ratio": s,
                "mean_accepted_draft_tokens": mean(value),
            }
            for s, value in points
        ]
        flags = {"num_draft_tokens": 8, "model": "m"}
        return {"rows": rows, "flags": flags}

    assert claims.accepted(pillar((0.05, 3.5))) == ("missed", "3.5 +- 0.1 of 8 (m)")
    assert claims.accepted(pillar((0.05, 6.1)))[0] == "undecided"
    assert claims.accepted(pillar((0.05, 6.5)))[0] == "met"
    more = claims.saturates_in_budget(pillar((0.05, 3.5), (0.2, 5.0)))
    assert more == ("missed", "3.5 +- 0.1 at 0.05, 5 +- 0.1 at 0.2")
    assert claims.saturates_in_budget(pillar((0.05, 3.5), (0.2, 3.6)))[0] == "undecided"
    same = {"num_tokens": 8, "num_differing_tokens": 1}
    assert claims.lossless({"rows": [same]})[0] == "missed"
    rows = [{"chosen_speedup": 0.9, "chosen_of_best": 1.0}]
    assert claims.speedup_map({"rows": rows})[0] == "missed"
    used = {"policy": "offload", "utilisation": 0.99, "recompute_ratio": 0.1}
    assert claims.simulator({"rows": [used]})[0] == "missed"
    rows = [{"proposer": "eagle", "accepted_drafts": mean(2.5)}]
    assert claims.eagle({"rows": rows, "num_texts": 1})[0] == "missed"
    assert claims.offload({"offload_over_recompute": 1.2})[0] == "not measured"
