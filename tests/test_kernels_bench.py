"""The benchmark: its rows, its inputs, and every operation timed on a CPU, small."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import pytest

from pallas_kernels import bench, timing
from pallas_kernels.paged_attention import bench as attention_bench
from pallas_kernels.paged_attention import paged_attention

RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results"
RATES = timing.Rates(read=1e12, copy=1e12)
SMALL = {
    "mixed": dict(groups=((2, 1), (1, 9)), kv_lengths=(41, 64, 200), num_heads=2),
    "select_32k": dict(num_candidates=256, cap=32, lengths=(256,), budgets=(32,)),
    "gather_512b": dict(num_lanes=2, context=128, cap=70),
    "write_136": dict(num_pages=8),
    "rotate_d64": dict(num_tokens=8),
    "norm_136": dict(shape=(4, 96)),
}


def small_case(name):
    """Returns the operation and the case of a row, with small sizes."""
    operation, case = bench.CASES[name]
    return operation, dataclasses.replace(case, **SMALL[name])


@pytest.fixture
def little_time(monkeypatch):
    for name, value in (("MIN_PROGRAMS", 1), ("REPEATS", 1), ("SECONDS", 0.0)):
        monkeypatch.setattr(timing, name, value)


def test_rows_bear_the_names_of_those_recorded():
    recorded = json.loads((RESULTS / "kernels_h100.json").read_text())["cases"]
    assert set(recorded) <= set(bench.CASES)
    assert [name for name in bench.CASES if name in recorded] == list(recorded)
    for name, (_, case) in bench.CASES.items():
        assert case.name == name


def test_inputs_have_needles_and_nan():
    _, case = small_case("mixed")
    case = dataclasses.replace(case, mass_group=1)
    layers, (pool, kv_lengths, q_lengths) = attention_bench.attention_layers(case, 1)
    q, table = layers[0]
    assert jnp.isnan(pool[table[0, 0], :, 41:]).all()
    assert not jnp.isnan(pool[table[0, 0], :, :41]).any()
    assert not jnp.isnan(pool[table[1, 0]]).any()
    args = (q, pool, table, kv_lengths, q_lengths)
    result = paged_attention(*args, **case.options, impl="reference")
    # A needle gives its key nearly all of the probability.
    values = pool[table[0, 0], 0, :41, case.head_size :].astype(jnp.float32)
    distance = jnp.abs(result.out[0, 0].astype(jnp.float32) - values).max(1).min()
    assert distance < 0.1


def test_calls_side_by_side_are_refused(monkeypatch):
    flag = "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
    monkeypatch.setenv("XLA_FLAGS", flag)
    with pytest.raises(ValueError, match="CONCURRENT"):
        bench.run([], "reference", "none", None)


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize("name", SMALL)
def test_every_operation_is_timed_and_compared(name):
    operation, case = small_case(name)
    result = operation.bench(case, impl="reference", rates=RATES, num_layers=2)
    recorded = json.loads((RESULTS / "kernels_h100.json").read_text())["cases"][name]
    assert set(result) == set(recorded) - {"cudnn_us", "ratio_to_sum"}
    times = [value for key, value in result.items() if key.endswith("us")]
    assert len(times) >= 1 and min(times) > 0
    assert result.get("exact", True) and result.get("error", 0.0) == 0.0
    assert result.get("out_error", 0.0) == 0.0


def test_a_report_is_written_after_every_row(
    tmp_path, little_time, monkeypatch, capsys
):
    monkeypatch.setattr(timing, "measure_rates", lambda: RATES)
    monkeypatch.setitem(bench.CASES, "write_136", small_case("write_136"))
    path = tmp_path / "report.json"
    bench.run(["write_136"], "reference", "none", str(path))
    report = json.loads(path.read_text())
    recorded = json.loads((RESULTS / "kernels_h100.json").read_text())
    assert set(report) == set(recorded)
    assert list(report["cases"]) == ["write_136"]
    first, row = capsys.readouterr().out.splitlines()
    assert first == "read 1.000 TB/s, copy 1.000 TB/s"
    assert row.startswith("write_136         us ")
