"""The throughput experiment: its loads, the time split of a trace, one small run."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import made_up, pressure, record, time_split
from experiments.loads import LOADS
from pallas_kernels import device_trace
from pallas_kernels.device_trace import Kernel
from sparsespec_jax import save_checkpoint
from sparsespec_jax.tuning import calibrate
from tests.engine_helpers import first_layers

SCOPES = {
    "loop_add_fusion_1": "jit(step)/Transformer/layer_0/add",
    "input_scatter_fusion": "jit(step)/Transformer/layer_0/write_rows/scatter",
    "input_reduce_fusion_2": "jit(step)/sample/reduce",
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("loop_add_fusion_1", "dense"),
        ("loop_add_fusion.1", "dense"),
        ("input_scatter_fusion", "attention"),
        ("paged_attention_finish_mosaic_gpu_kernel", "attention"),
        ("select_tokens_mosaic_gpu_kernel", "selection"),
        ("gather_kv_mosaic_gpu_kernel", "gather"),
        ("input_reduce_fusion_2", "sampling"),
        ("MemcpyH2D", "copies"),
        ("nvjet_sm90_unknown", "dense"),
    ],
)
def test_kernels_are_sorted_by_scope(name, wanted):
    assert time_split.category(name, SCOPES) == wanted


def test_time_split_of_two_hand_made_steps():
    ms = 1e6
    kernels = [
        Kernel("nvjet", 0 * ms, 2 * ms),
        Kernel("gather_kv", 1 * ms, 2 * ms),  # overlaps by one
        Kernel("nvjet", 5 * ms, 4 * ms),  # after two of nothing
        Kernel("gather_kv", 9 * ms, 1 * ms),
    ]
    got = time_split.split(kernels, {}, num_steps=2)
    assert got["ms_per_step"]["dense"] == pytest.approx(3.0)
    assert got["ms_per_step"]["gather"] == pytest.approx(1.5)
    assert got["window_ms_per_step"] == pytest.approx(5.0)
    assert got["idle_ms_per_step"] == pytest.approx(1.0)
    assert got["idle_share"] == pytest.approx(0.2)
    assert got["kernels_per_step"] == 2
    (first, second) = time_split.largest(kernels, 2)
    assert first == {"name": "nvjet", "us_per_step": 3000.0, "runs_per_step": 1.0}
    assert second["us_per_step"] == pytest.approx(1500.0)


def test_gaps_between_steps_are_the_longest_ones():
    kernels = [Kernel("a", t, 10.0) for t in (0, 11, 30, 41, 62, 73)]
    got = time_split.split(kernels, {}, num_steps=3)
    assert got["idle_share"] == pytest.approx(23 / 83)
    assert got["idle_between_steps_share"] == pytest.approx((9 + 11) / 83)
    assert got["idle_between_steps_us"] == pytest.approx(
        {"p50": 0.010, "p99": 0.01098, "p100": 0.011}
    )


def test_the_step_in_which_the_profiler_starts_is_left_out():
    kernels = [Kernel("a", t, 10.0) for t in (0, 900, 1000, 1011, 1030, 1041, 1055)]
    assert time_split.after_first_step(kernels, 3) == (kernels[2:], 2)
    assert time_split.after_first_step(kernels[:2], 1) == (kernels[:2], 1)


def test_copies_beside_kernels_are_hidden():
    ms = 1e6
    kernels = [
        Kernel("nvjet", 0 * ms, 4 * ms),
        Kernel("gather_kv", 3 * ms, 2 * ms),
        Kernel("MemcpyD2H", 4 * ms, 2 * ms),  # half of it beside the second kernel
        Kernel("MemcpyD2D", 8 * ms, 9 * ms),  # stays on the device
        Kernel("MemcpyH2D", 20 * ms, 2 * ms),
    ]
    got = time_split.hidden_copy_share(kernels, count=1)
    assert got["copy_ms"] == pytest.approx(4.0)
    assert got["hidden_share"] == pytest.approx(0.25)
    (longest,) = got["longest"]
    assert longest == {
        "name": "MemcpyD2H", "start_ms": 4.0, "ms": 2.0, "hidden_share": 0.5
    }  # fmt: skip


def test_the_device_idles_where_only_copies_run():
    ms = 1e6
    kernels = [
        Kernel("MemcpyH2D", -3 * ms, 1 * ms),
        Kernel("nvjet", 0 * ms, 4 * ms),
        Kernel("gather_kv", 3 * ms, 2 * ms),
        Kernel("MemcpyD2D", 6 * ms, 1 * ms),
        Kernel("nvjet", 9 * ms, 1 * ms),
    ]
    assert time_split.idle_ms(kernels) == pytest.approx(4.0)


def test_the_busiest_steps_move_pages_both_ways():
    spilled = np.array([0, 0, 9, 9, 10, 12, 12, 12])
    restored = np.array([0, 0, 0, 0, 1, 2, 2, 9])
    moved = np.stack([spilled, restored], axis=1)
    assert pressure.busiest_step(moved, 2) == 3
    assert pressure.busiest_step(moved, 99) == 0


def test_scopes_come_from_the_compiled_program():
    @jax.jit
    def stepping(plan, x):
        with jax.named_scope("sample"):
            y = jnp.sort(x) * plan[0]
        return y @ x

    stepping(jnp.ones(77, jnp.int32), jnp.ones(8)).block_until_ready()
    paths = time_split.scopes_of("jit_stepping", 77).values()
    assert any("/sample/" in path for path in paths)
    assert time_split.scopes_of("jit_stepping", 78) == {}


def test_no_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no trace"):
        device_trace.load_kernels(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="float16"),
        dict(num_requests=0),
        dict(new_tokens=0),
        dict(num_draft_tokens=0),
        dict(temperature=-1.0),
        dict(forced_acceptance=9.0),
        dict(lag=5),
    ],
)
def test_a_wrong_load_is_refused(options):
    with pytest.raises(ValueError):
        dataclasses.replace(LOADS["qwen3_8b_64x512x4096"], **options)


def test_a_load_that_chooses_k_compiles_all_that_it_chooses_from():
    load = LOADS["qwen3_8b_64x512x4096"]
    assert load.speculation().draft_token_choices == ()
    load = dataclasses.replace(load, chooses_k=True)
    assert load.speculation().draft_token_choices == (0, 2, 4)


def test_another_k_of_a_forced_load_has_drafts_accepted_as_often():
    load = LOADS["qwen3_8b_64x512x4096"]
    share = load.speculation().forced_probability
    assert load.of_drafts(8).forced_acceptance == pytest.approx(6.16)
    for k in (1, 4, 12):
        other = load.of_drafts(k).speculation()
        assert other.num_draft_tokens == k
        assert other.forced_probability == pytest.approx(share)
    real = LOADS["coder15_128x8k"].of_drafts(4)
    assert real.forced_acceptance == -1 and real.num_draft_tokens == 4


@pytest.mark.parametrize("name", LOADS)
def test_a_load_is_what_its_name_says(name):
    load, parts = LOADS[name], name.split("_")[-1].split("x")
    if parts == ["long"]:
        assert (load.num_slots, load.new_tokens) == (128, 8000)
        return
    assert load.num_requests == load.num_slots == int(parts[0])
    if parts[1].endswith("k"):
        assert load.context_length == 1024 * int(parts[1][:-1])
    elif len(parts) == 3:
        assert (load.prompt_length, load.new_tokens) == tuple(map(int, parts[1:]))


def test_steps_of_a_load_on_made_up_caches(tiny_model):
    load = dataclasses.replace(
        LOADS["qwen3_8b_64x512x4096"], num_slots=4, dtype="float32", prefill_chunk=16
    )
    engine = made_up.make_engine(tiny_model, load, [0, 2], 300)
    plans = calibrate.made_up_cycle(engine, 2, 300)
    slots = [plan.views["verify_slots"].tolist() for plan in plans]
    assert sorted(slot for step in slots for slot in step if slot < 4) == [0, 1, 2, 3]
    steps = calibrate.measure(engine, [20, 300])
    assert {k: [t for t, _ in points] for k, points in steps.items()} == {
        0: [80, 1200],
        2: [80, 1200],
    }


def test_a_small_load_end_to_end(default_model, tmp_path):
    """Real weights and prompts, of a model cut to its first layers."""
    output, folder = tmp_path / "run", tmp_path / "model"
    save_checkpoint(first_layers(default_model, 2), folder)
    command = [
        sys.executable, "-m", "experiments.throughput", "--load=smollm2_256x4096",
        f"--model={folder}", "--num_requests=2", "--num_slots=2", "--new_tokens=12",
        "--page_size=16", "--dtype=float32", "--prefill_lanes=1", "--trace_steps=0",
        "--num_draft_tokens=2", f"--output={output}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    metrics = json.loads((output / "summary.json").read_text())
    assert metrics["forced_acceptance"] is None
    assert 0 < metrics["kv_share"] < 1
    assert metrics["speedup"] == pytest.approx(
        metrics["spec_decode_tokens_per_s"] / metrics["ar_decode_tokens_per_s"]
    )
    runs = record.load(output)[1]
    assert [run["mode"] for run in runs] == ["plain", "speculative"]
    for run in runs:
        assert run["stats"]["total"]["num_output_tokens"] == 24
        parts = ("prefill", "decode", "tail")
        assert sum(run[part]["tokens"] for part in parts) == 24


def test_the_map_takes_lengths_that_the_pool_holds_and_the_cost_models_choice():
    load = dataclasses.replace(LOADS["qwen3_8b_64x512x4096"], num_slots=32)
    bytes_per_token = 147_456
    needed = 32 * 4096 * bytes_per_token
    assert not made_up.fits(load, [0, 8], 4096, needed)
    assert made_up.fits(load, [0, 8], 4096, 1.2 * needed)
    # Beyond what the model was made for.
    assert not made_up.fits(load, [0, 8], 40_960, 100 * needed)

    steps = {  # k = 8 pays from 2,000 tokens on
        0: ((32e3, 6e-3), (64e3, 9e-3), (128e3, 15e-3)),
        8: ((32e3, 8e-3), (64e3, 8e-3), (128e3, 9e-3)),
    }
    rows = made_up.speedup_rows(32, [1000, 2000, 4000], steps, (0.9,) * 8)
    for row, (plain, drafting) in zip(
        rows, zip((6, 9, 15), (8, 8, 9), strict=True), strict=True
    ):
        assert row["speedup"][8] == pytest.approx(8.2 / 9 * plain / drafting)
        assert row["chosen_speedup"] == row["speedup"][row["chosen_k"]]
    assert [row["best_k"] for row in rows] == [0, 8, 8]
    # A line from 1,000 to 4,000 tokens has 8.3 ms at 2,000, which would not pay.
    assert [row["chosen_k"] for row in rows] == [0, 0, 8]
    assert rows[1]["chosen_of_best"] == pytest.approx(1 / rows[1]["speedup"][8])
