"""Contexts of the acceptance experiment, and both long experiments in small."""

import subprocess
import sys

import pytest

from experiments import contexts, record


def test_prompts_are_different_and_repeatable():
    first = contexts.prompts(32)
    assert len({str(p) for p in first}) == 32
    assert contexts.prompts(5) == first[:5]
    with pytest.raises(ValueError, match="at most 32, got 33"):
        contexts.prompts(33)


def test_cut_gives_one_context_per_text_and_range():
    texts = [list(range(3000)), list(range(1500))]
    got = contexts.cut(texts, seed=3)
    lengths = [len(c) for c in got]
    assert len(lengths) == 4  # the short text reaches one range only
    for length, (low, high) in zip(
        lengths, [*contexts.RANGES, contexts.RANGES[0]], strict=True
    ):
        assert low <= length < high
    assert all(c == list(range(len(c))) for c in got)
    assert contexts.cut(texts, seed=3) == got != contexts.cut(texts, seed=4)


def test_is_looping_sees_loops_and_nothing_else():
    assert contexts.is_looping(list(range(10)) * 6)
    assert not contexts.is_looping(list(range(96)))
    assert not contexts.is_looping(list(range(80)) + list(range(16)))
    assert not contexts.is_looping([1, 2, 3])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_acceptance_and_lossless_run_in_small(tmp_path):
    module = [sys.executable, "-m"]
    out, texts = tmp_path / "acceptance", tmp_path / "contexts.json"
    command = [
        *module, "experiments.contexts", "--num_prefixes=2", "--ranges=500-1000",
        f"--output={texts}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    command = [
        *module, "experiments.acceptance", f"--contexts={texts}", "--max_tokens=20",
        "--num_slots=2", "--rows=full:1,window:0.05", f"--output={out}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    full, window = record.load(out)[1]
    assert full["accepted_histogram"][:-1] == [0] * 8
    assert window["identical_contexts"] == full["identical_contexts"] == 2
    out = tmp_path / "lossless"
    command = [
        *module, "experiments.lossless", "--num_requests=1", "--max_tokens=40",
        "--lags=0,2", "--page_sizes=16", f"--output={out}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    rows = record.load(out)[1]
    assert [row["num_differing_tokens"] for row in rows] == [0, 0]
