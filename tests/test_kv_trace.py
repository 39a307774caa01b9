"""The trace replay: its load is the one asked for and its policies differ."""

import dataclasses

import numpy as np
import pytest

from experiments.kv_trace import Replay, TraceOptions, acceptance_law, lengths

OPTIONS = TraceOptions(num_requests=200, num_slots=24, scale=64)


def test_lengths_have_the_moments_asked_for():
    drawn = lengths(TraceOptions(longest=10**6), 100_000)
    assert drawn.mean() == pytest.approx(13_000, rel=0.02)
    assert drawn.std() == pytest.approx(7_600, rel=0.05)


def test_cycles_accept_the_mean_asked_for():
    law = np.append(acceptance_law(TraceOptions()), 1.0)
    rows = (np.diff(law, prepend=0.0) * np.arange(1, 10)).sum()
    assert rows - 1 == pytest.approx(6.16, abs=1e-6)


@pytest.fixture(scope="module")
def rows():
    policies = ("offload", "recompute", "reserve", "oracle")
    return {policy: Replay(OPTIONS, policy).run() for policy in policies}


def test_offload_fills_the_pool_and_loses_nothing(rows):
    row = rows["offload"]
    assert row["num_requests"] == 200
    assert row["utilisation"] > 0.9
    assert row["spilled_pages"] == row["restored_pages"] > 0
    assert row["recompute_ratio"] == 0
    assert rows["recompute"]["recompute_ratio"] > 0.01
    assert rows["recompute"]["spilled_pages"] == 0


def test_reserving_leaves_most_of_the_pool_unused(rows):
    assert rows["reserve"]["utilisation"] < rows["oracle"]["utilisation"]
    assert rows["oracle"]["utilisation"] < rows["offload"]["utilisation"]
    assert rows["reserve"]["steps"] > 2 * rows["offload"]["steps"]
    assert rows["reserve"]["preemptions"] == rows["oracle"]["preemptions"] == 0


def test_the_scale_divides_the_page():
    with pytest.raises(ValueError, match="scale must divide page_size 64, is 5"):
        Replay(dataclasses.replace(OPTIONS, scale=5), "offload")
