"""The product with a weight in 8 bits: references by hand, kernels interpreted.

Inputs are small whole numbers, of which every order gives the same sum. Rows that fill
up a tile of the GPU kernel, and what lies behind the outputs of a TPU's, are NaN.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import RACES, compile_interpreted

from pallas_kernels import timing
from pallas_kernels.add_norm import add_norm
from pallas_kernels.cases import by_name, tagged
from pallas_kernels.int8_matmul import (
    Int8Weight,
    bench,
    choose_parts,
    gpu,
    int8_matmul,
    pack,
    quantise,
    sweep,
    tpu,
)
from pallas_kernels.int8_matmul.cases import INT8_CASES, ROWS, Int8Case
from pallas_kernels.int8_matmul.tiling import Tiling, choose_tiling

RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results"
SMALL = tagged(INT8_CASES, "small")
# All ways to cut: a warpgroup without outputs, turns that do and do not divide the
# steps of a part, more steps than stages.
TILINGS = dict(
    one=Tiling(groups=1, ctas=4),
    two=Tiling(groups=2, turn=2),
    three=Tiling(groups=3, turn=4, ctas=2),
    parts=Tiling(groups=1, parts=3, turn=2),
)
TILED = Int8Case(name="tiled", num_tokens=16, weight=(1152, 128))


@functools.cache
def on_gpu(case, tiling=None):
    """The interpreted kernel of a case, compiled once: raises after a race."""

    def kernel(x, values, scale):
        return gpu.int8_matmul_gpu(
            x, values, scale, parts=case.parts, tiling=tiling, interpret=RACES
        )

    def order(inputs):
        weight = Int8Weight(*map(jnp.asarray, inputs[1:]))
        return inputs[0], *gpu.pack_gpu(weight)

    run = compile_interpreted(kernel, order(ki.int8_inputs(case)))
    return lambda inputs: run(order(inputs))


@functools.cache
def on_tpu(case):
    """The interpreted TPU kernel of a case, compiled once."""
    run = functools.partial(int8_matmul, parts=case.parts, impl="tpu_interpret")
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    return jax.jit(run).lower(*ki.int8_inputs(case)).compile(options)


def run_on(platform, case, inputs):
    if platform == "tpu":
        return on_tpu(case)(*map(jnp.asarray, inputs))
    return on_gpu(case)(inputs)


def product(case, inputs):
    """The product of whole numbers: exact sums, times the scale, rounded once."""
    x, values, scale = inputs
    parts = case.parts or 1
    x = x.astype(np.float32).reshape(len(x), parts, -1)
    values = values.astype(np.float32).reshape(len(values), parts, -1)
    wide = np.einsum("tpi,opi->pto", x, values) * scale
    return wide[0].astype(jnp.bfloat16) if case.parts is None else wide


platforms = pytest.mark.parametrize("platform", ["gpu", "tpu"])


# ---------------------------------------------------------------- by hand


def test_product_by_hand():
    x = jnp.asarray([[1, 2, -1, 4], [0, 0.5, 0, -2]], jnp.bfloat16)
    values = jnp.asarray([[3, 0, 1, 2], [-127, 127, 1, 0]], jnp.int8)
    scale = jnp.asarray([2.0, 0.5])
    got = int8_matmul(x, values, scale, impl="reference")
    assert got.dtype == jnp.bfloat16
    # 3 - 1 + 8 = 10, -127 + 254 - 1 = 126; -4, 63.5
    assert got.tolist() == [[20, 63], [-8, 31.75]]
    parts = int8_matmul(x, values, scale, parts=2, impl="reference")
    assert parts.dtype == jnp.float32
    assert parts.tolist() == [[[6, 63.5], [0, 31.75]], [[14, -0.5], [-8, 0]]]


def test_sums_are_float32_and_rounded_once_behind_the_scale():
    # 256 + 1 is no bfloat16; 257 * 2 neither, and rounds to 512; (256 + 2) * 0.5 is.
    x = jnp.asarray([[256, 1, 0], [256, 1, 1]], jnp.bfloat16)
    values, scale = jnp.ones((2, 3), jnp.int8), jnp.asarray([2.0, 0.5])
    got = int8_matmul(x, values, scale, impl="reference")
    assert got.tolist() == [[512, 128], [516, 129]]
    wide = int8_matmul(x, values, scale, parts=1, impl="reference")
    assert wide.tolist() == [[[514, 128.5], [516, 129]]]


def test_quantising_by_hand():
    # Scales 1, 1/127 and 0.5: largest weights 127, -1 and 63.5.
    kernel = jnp.asarray(
        [[127.0, 0.5, 63.5], [-2.5, -1.0, 0.2], [1.5, 0.0, -0.3], [-0.6, 0.26, -63.5]]
    )
    values, scale = quantise(kernel)
    np.testing.assert_allclose(scale, [1, 1 / 127, 0.5], rtol=1e-7)
    assert values.dtype == jnp.int8
    # Halves go to the even neighbour: -2.5, 1.5, 63.5 (0.5 * 127).
    wanted = [[127, -2, 2, -1], [64, -127, 0, 33], [127, 0, -1, -127]]
    assert values.tolist() == wanted


def test_quantised_outputs_of_zeros_and_of_several_axes():
    kernel = np.zeros((2, 3, 2), np.float32)
    kernel[:, 1, 0] = 1, -4
    values, scale = quantise(jnp.asarray(kernel, jnp.bfloat16))
    assert values.shape == (6, 2) and values[2].tolist() == [32, -127]
    assert not values[np.arange(6) != 2].any() and (scale > 0).all()
    with pytest.raises(ValueError, match="no axis may be empty"):
        quantise(jnp.zeros((0, 3)))


def test_rounding_errs_by_half_a_step_at_most():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 96)) * np.geomspace(1e-6, 9, 96)
    values, scale = map(np.asarray, quantise(jnp.asarray(kernel, jnp.float32)))
    error = np.abs((values * scale[:, None]).T - kernel)
    assert (error <= 0.5001 * scale).all()
    assert np.abs(values.astype(int)).max(axis=1).tolist() == [127] * 96


# ----------------------------------------------------------------- packing


def test_packed_blocks_lie_as_threads_take_them():
    rows, columns = np.meshgrid(np.arange(128), np.arange(256), indexing="ij")
    packed = {}
    for name, x in dict(rows=rows, columns=columns).items():
        weight = Int8Weight(jnp.int8(x % 128), jnp.ones(128))
        blocks = np.asarray(pack(weight, impl="gpu").values)
        assert blocks.shape == (2, 2, 32, 256)
        packed[name] = blocks[1, 1].reshape(4, 128, 16)  # of a thread, 16 at a time
    for number, thread in ((0, 0), (1, 5), (2, 38), (3, 127)):
        warp, row, column = thread // 32, thread % 32 // 4, thread % 4
        mine = packed["rows"][number, thread]
        assert set(mine.tolist()) == {64 + 16 * warp + 8 * (number % 2) + row}
        first = 64 * (number // 2) + 2 * column
        expected = [first + 16 * g + i for g in range(4) for i in (0, 1, 8, 9)]
        assert packed["columns"][number, thread].tolist() == expected


def test_packing_fills_up_inputs_and_turns_back():
    _, values, scale = ki.int8_inputs(by_name(INT8_CASES, "int8_ragged"))
    weight = Int8Weight(jnp.asarray(values), jnp.asarray(scale))
    packed = pack(weight, impl="gpu_interpret")
    assert packed.values.shape == (5, 2, 32, 256)
    blocks = [[gpu._unpacked(block) for block in tile] for tile in packed.values]
    whole = np.block(blocks)
    np.testing.assert_array_equal(whole[:, :192], values)
    assert not whole[:, 192:].any()
    for impl in ("reference", "tpu"):
        plain = pack(weight, impl=impl)
        assert plain.values is weight.values and plain.scale is weight.scale


# ----------------------------------------------------- kernels and references


@platforms
@ki.each_case(SMALL)
def test_product_is_that_of_the_reference(platform, case):
    inputs = ki.int8_inputs(case)
    expected = int8_matmul(*inputs, **case.options, impl="reference")
    ki.assert_same_bits(expected, product(case, inputs))
    ki.assert_same_bits(run_on(platform, case, inputs), expected)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_every_way_to_cut_gives_the_product(tiling):
    parts = tiling.parts if tiling.parts > 1 else None
    case = dataclasses.replace(TILED, parts=parts)
    inputs = ki.int8_inputs(case)
    ki.assert_same_bits(on_gpu(case, tiling)(inputs), product(case, inputs))


@platforms
def test_single_weights_are_found_where_they_are(platform):
    """Of a few outputs one weight is not 0, at the edges of what is cut."""
    case = by_name(INT8_CASES, "int8_ragged")
    x, _, scale = ki.int8_inputs(case)
    x = np.where(x == 0, 1, x).astype(x.dtype)
    places = [(0, 0), (8, 9), (63, 127), (64, 128), (200, 65), (319, 191)]
    outputs, columns = np.transpose(places)
    values = np.zeros((320, 192), np.int8)
    values[outputs, columns] = 7, -128, 1, -1, 64, 127
    got = run_on(platform, case, (x, values, scale))
    ki.assert_same_bits(got, product(case, ki.Int8Inputs(x, values, scale)))
    found = np.asarray(got, np.float32) != 0
    assert found[:, outputs].all() and found.sum() == 24 * len(places)


@platforms
def test_a_row_of_nan_is_the_only_one(platform):
    case = by_name(INT8_CASES, "int8_many_rows")
    x, values, scale = ki.int8_inputs(case)
    x[[5, 70, 135]] = np.nan
    got = np.asarray(run_on(platform, case, (x, values, scale)), np.float32)
    is_nan = np.isnan(got)
    assert is_nan[[5, 70, 135]].all() and is_nan.sum() == 3 * 128
    rest = ~is_nan.any(1)
    expected = product(case, ki.Int8Inputs(x[rest], values, scale))
    np.testing.assert_array_equal(got[rest], expected.astype(np.float32))


def test_the_kernel_behind_sums_parts():
    case = by_name(INT8_CASES, "int8_parts")
    inputs = ki.int8_inputs(case)
    stream, scale = jnp.ones((8, 192), jnp.bfloat16), jnp.ones(192, jnp.bfloat16)
    whole = int8_matmul(*inputs, impl="reference")
    expected = add_norm(stream, whole, scale, eps=1e-6, impl="reference")
    parts = run_on("gpu", case, inputs)
    got = add_norm(stream, parts, scale, eps=1e-6, impl="reference")
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-2
        )


# What a fault in a kernel would do.
def next_scale(inputs):
    """Scales are those of the output before."""
    return inputs._replace(scale=np.roll(inputs.scale, 1))


def lose_last_block(inputs):
    """The last block of inputs is left out."""
    values = inputs.values.copy()
    values[:, (values.shape[1] - 1) // 128 * 128 :] = 0
    return inputs._replace(values=values)


def swap_halves(inputs):
    """The two rows that a thread has of 16 are taken for each other."""
    values = inputs.values.reshape(-1, 2, 8, inputs.values.shape[1])[:, ::-1]
    return inputs._replace(values=values.reshape(inputs.values.shape))


def swap_warpgroups(inputs):
    """Two warpgroups store at each other's place."""
    values = np.concatenate([inputs.values[64:128], inputs.values[:64]])
    values = np.concatenate([values, inputs.values[128:]])
    return inputs._replace(values=values)


def unsigned(inputs):
    """The highest bit of a value counts 128, not -128."""
    values = np.maximum(inputs.values, -inputs.values - 1)
    return inputs._replace(values=values)


FAULTS = next_scale, lose_last_block, swap_halves, swap_warpgroups, unsigned


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["int8_ragged", "int8_parts"])
def test_the_comparison_shows_faults(fault, name):
    """What kernels are compared with; of other numbers, the kernels give the same."""
    case = by_name(INT8_CASES, name)
    inputs = ki.int8_inputs(case)
    faulty = product(case, fault(inputs))
    with pytest.raises(AssertionError):
        ki.assert_same_bits(faulty, product(case, inputs))


def lose_last_step(launch, spec, x, values, scale):
    """Each CTA stops a step too early."""
    spec = dataclasses.replace(spec, num_steps=spec.num_steps - 1)
    return launch(spec, x, values, scale)


def take_other_scales(launch, spec, x, values, scale):
    """Every output has the scale of its neighbour."""
    return launch(spec, x, values, jnp.roll(scale, 1))


@pytest.mark.parametrize("fault", [lose_last_step, take_other_scales])
def test_a_fault_in_the_gpu_kernel_shows(monkeypatch, fault):
    case = Int8Case(name="faulty", num_tokens=8, weight=(256, 64))
    inputs = ki.int8_inputs(case)
    x, *weight = map(jnp.asarray, inputs)
    monkeypatch.setattr(gpu, "_launch", functools.partial(fault, gpu._launch))
    kernel = gpu.int8_matmul_gpu.__wrapped__  # not what is compiled already
    got = kernel(x, *gpu.pack_gpu(Int8Weight(*weight)), interpret=True)
    with pytest.raises(AssertionError):
        ki.assert_same_bits(got, product(case, inputs))


def test_a_fault_in_the_tpu_kernel_shows(monkeypatch):
    case = Int8Case(name="faulty", num_tokens=16, weight=(4352, 64))  # two blocks
    inputs = ki.int8_inputs(case)
    add = tpu._add_block

    def stop_early(*refs, num_blocks):
        add(*refs, num_blocks=num_blocks - 1)

    monkeypatch.setattr(tpu, "_add_block", stop_early)
    kernel = tpu.int8_matmul_tpu.__wrapped__
    got = kernel(*map(jnp.asarray, inputs), interpret=True)
    with pytest.raises(AssertionError):
        ki.assert_same_bits(got, product(case, inputs))


# ------------------------------------------------------------------ refusals


@pytest.mark.usefixtures("no_type_checks")
def test_product_rejects_what_does_not_fit():
    x, values, scale = map(jnp.asarray, ki.int8_inputs(SMALL[0]))
    packed = pack(Int8Weight(values, scale), impl="gpu")
    other = pack(Int8Weight(jnp.zeros((128, 128), jnp.int8), jnp.ones(128)), impl="gpu")
    wide = x.astype(jnp.float32)
    plain, for_gpu = dict(impl="reference"), dict(impl="gpu_interpret")
    for args, options, word in (
        ((x[0], values, scale), plain, "x has shape"),
        ((x[:0], values, scale), plain, "no axis may be empty"),
        ((x, values[:, :64], scale), plain, "values has shape"),
        ((x, values, scale[:3]), plain, "values has shape"),
        ((x, values, scale[None]), plain, "scale has shape"),
        ((wide, values, scale), plain, "x has dtype"),
        ((x, values.astype(jnp.int32), scale), plain, "values has dtype"),
        ((x, values, scale.astype(jnp.bfloat16)), plain, "scale has dtype"),
        ((x, values, scale), plain | dict(parts=3), "parts is 3"),
        ((x, values, scale), plain | dict(parts=0), "parts is 0"),
        ((x, *packed), plain, "not packed for a TPU or the reference"),
        ((x, values, scale), for_gpu, "not packed for a GPU: use pack"),
        ((x, other.values, scale), for_gpu, "blocks of 64 outputs"),
    ):
        with pytest.raises(ValueError, match=word) as error:
            int8_matmul(*args, **options)
        assert "\n" not in str(error.value)


def test_packing_rejects_what_does_not_fit():
    values, scale = jnp.ones((64, 128), jnp.int8), jnp.ones(64)
    for weight, word in (
        ((values[0], scale), "values has shape"),
        ((values[:, :0], scale), "no axis may be empty"),
        ((values, scale[:3]), "scale has shape"),
        ((values.astype(jnp.int32), scale), "values has dtype"),
        ((values, scale.astype(jnp.bfloat16)), "scale has dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            pack(Int8Weight(*weight), impl="reference")
    for part, word in ((values[:48], "48 outputs"), (values[:, :96], "96 inputs")):
        with pytest.raises(NotImplementedError, match=word):
            pack(Int8Weight(part, scale[: len(part)]), impl="gpu")


def test_kernels_refuse_shapes_that_they_have_not():
    x, values, scale = map(jnp.asarray, ki.int8_inputs(SMALL[0]))
    packed = pack(Int8Weight(values, scale), impl="gpu")
    many = jnp.zeros((1032, 128), jnp.bfloat16)
    for impl, weight in (("gpu_interpret", packed), ("tpu_interpret", (values, scale))):
        with pytest.raises(NotImplementedError, match="1032 rows"):
            int8_matmul(many, *weight, impl=impl)
    with pytest.raises(NotImplementedError, match="cut into 2 parts"):
        int8_matmul(x, *packed, parts=2, impl="gpu_interpret")
    with pytest.raises(NotImplementedError, match="a part has 64 inputs"):
        int8_matmul(x, values, scale, parts=2, impl="tpu_interpret")
    with pytest.raises(ValueError, match="does not make parts=None"):
        gpu.int8_matmul_gpu(x, *packed, tiling=Tiling(parts=2))
    with pytest.raises(NotImplementedError, match="no shared memory for 256 rows"):
        gpu.int8_matmul_gpu(
            jnp.zeros((256, 128), jnp.bfloat16), *packed, tiling=Tiling(ctas=4)
        )


# ------------------------------------------------------------------- tilings


@pytest.mark.parametrize("name", ["groups", "parts", "ctas", "turn"])
def test_tiling_rejects_other_sizes(name):
    with pytest.raises(ValueError, match=f"{name} lies in 1"):
        Tiling(**{name: 0})


def test_chosen_tilings_are_the_fastest_of_those_measured():
    rows = json.loads((RESULTS / "int8_matmul_h200.json").read_text())["rows"]
    assert len(rows) == 15
    for row in rows:
        times = {name: way["us"] for name, way in row["ways"].items() if "us" in way}
        ours = {name: us for name, us in times.items() if name.startswith("Tiling")}
        size = row["rows"], row["inputs"], row["outputs"]
        chosen = choose_tiling(*size)
        assert str(chosen) == min(ours, key=ours.get), size
        assert choose_parts(*size) == chosen.parts
        assert min(ours.values()) < min(times["xla"], times["xla of bfloat16"]), size


def test_a_tiling_is_chosen_for_all_that_models_have():
    for case in INT8_CASES:
        if "timed" not in case.tags and "h100" not in case.tags:
            continue
        sizes = case.num_tokens, *case.weight
        chosen = choose_tiling(*sizes, case.parts or 1)
        assert chosen.parts == (case.parts or 1)
        assert chosen.why_not(*sizes) is None
    models = 3 * 4 * len(ROWS)
    assert (
        sum(case.name.endswith(tuple(map(str, ROWS))) for case in INT8_CASES) == models
    )


def test_registers_of_few_rows_have_room_for_three_ctas():
    """By hand: 65,536 over 256 threads with 68 + 12 registers, with 68 + 32."""
    assert Tiling(groups=1).resident(24) == 3 and Tiling(groups=1).resident(64) == 2
    assert choose_tiling(24, 1536, 2048).ctas == 3
    for num_rows in (32, 64, 128, 256):
        chosen = choose_tiling(num_rows, 1536, 2048)
        assert chosen.ctas <= chosen.resident(num_rows)


def test_results_take_no_more_room_than_the_weights_that_were_there():
    """A warpgroup's results lie over its own weights: the interpreter sees no union."""
    for num_rows in (8, 24, 136, 256):
        for tiling in (*TILINGS.values(), Tiling(groups=4)):
            for dtype in (jnp.bfloat16, jnp.float32):
                spec = gpu._Spec(
                    tiling=tiling, num_rows=num_rows, num_tiles=1, num_steps=1,
                    dtype=jnp.dtype(dtype), interpreter=None,
                )  # fmt: skip
                if spec.stages < 2:
                    continue
                bytes_of_results = spec.chunk * 64 * spec.dtype.itemsize
                assert bytes_of_results == spec.stages * 32 * 256
                assert spec.chunk % 8 == 0


# ------------------------------------------------------ benchmark and sweep


def test_bytes_of_a_case_by_hand():
    case = by_name(INT8_CASES, "int8_parts")  # 8 x 512 by 512 x 192, two parts
    moved = 2 * 8 * 512 + 512 * 192 + 4 * 192 + 4 * 2 * 8 * 192
    assert case.num_bytes == moved
    whole = dataclasses.replace(case, parts=None)
    assert whole.num_bytes == moved - 4 * 2 * 8 * 192 + 2 * 8 * 192


def test_the_benchmark_times_and_compares(monkeypatch):
    for name, value in (("MIN_PROGRAMS", 1), ("REPEATS", 1), ("SECONDS", 0.0)):
        monkeypatch.setattr(timing, name, value)
    case = dataclasses.replace(bench.CASES[1], num_tokens=8, weight=(64, 128))
    rates = timing.Rates(read=1e12, copy=1e12)
    result = bench.bench(case, impl="reference", rates=rates, num_layers=2)
    assert case.parts == 4 and result["bytes"] == case.num_bytes
    share = case.num_bytes / result["us"] / 1e6
    assert result["fraction_of_read"] == pytest.approx(share)
    assert 0 < result["error"] < 1e-5
    assert min(result["us"], result["xla_us"], result["bfloat16_us"]) > 0


def test_the_sweep_compares_and_times(monkeypatch, tmp_path, capsys):
    """On a CPU, by the reference in place of the kernel; one tiling fails, one errs."""

    def make(x, values, scale, parts, tiling):
        if tiling.turn == 2:
            raise RuntimeError("no such turn")
        made = int8_matmul(x, values, scale, parts=parts, impl="reference")
        return made * 2 if tiling.groups == 2 else made

    for name, value in dict(
        int8_matmul_gpu=make,
        pack_gpu=lambda weight: weight,
        PRODUCTS={"qwen3_8b": {"down": (256, 64)}},
        time_us=lambda *args: 2e3,
        _MOST_LAYERS=2,
    ).items():
        monkeypatch.setattr(sweep, name, value)
    rates = timing.Rates(read=1e9, copy=1e9)
    monkeypatch.setattr(timing, "measure_rates", lambda: rates)
    path = tmp_path / "int8.json"
    monkeypatch.setattr(sys, "argv", ["sweep", "--rows", "8", "--output", str(path)])
    sweep.main()
    assert "down 8: " in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["environment"]["command"].startswith(
        "python -m pallas_kernels.int8_matmul.sweep --rows 8"
    )
    (row,) = report["rows"]
    ways = row["ways"]
    assert row["chosen"] == str(choose_tiling(8, 256, 64)) and row["chosen"] in ways
    assert {"xla", "xla of bfloat16"} < set(ways)
    for name, way in ways.items():
        if "turn=2" in name:
            assert way == {"error": "RuntimeError: no such turn"}
        elif name != "xla of bfloat16":
            assert way["us"] == 1e3 and way["fraction_of_read"] == way["bytes"] / 1e6
            wrong = "groups=2" in name
            assert (way["difference"] > 0.9) == wrong
            assert wrong or way["difference"] < 4e-3


@pytest.mark.parametrize(
    "options, word",
    [
        (["--rows", "0"], "rows are [0]: name numbers in 1..256"),
        (["--rows", "8", "257"], "name numbers in 1..256"),
        (["--products", "heads", "tail"], "choose from down, gate_up, heads"),
        (["--turns", "3"], "invalid choice"),
    ],
)
def test_the_sweep_refuses_options_at_once(monkeypatch, capsys, options, word):
    monkeypatch.setattr(sys, "argv", ["sweep", "--output", "none", *options])
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    assert ended.value.code == 2 and word in capsys.readouterr().err


def test_the_sweep_refuses_calls_side_by_side(monkeypatch, capsys):
    flag = "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
    monkeypatch.setenv("XLA_FLAGS", flag)
    monkeypatch.setattr(sys, "argv", ["sweep", "--output", "none"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "CONCURRENT" in capsys.readouterr().err


# ------------------------------------------------------------- on the device


@pytest.mark.gpu
@ki.each_case([*SMALL, *tagged(INT8_CASES, "h100")])
def test_product_on_the_device(case):
    inputs = ki.int8_inputs(case)
    packed = pack(Int8Weight(*map(jnp.asarray, inputs[1:])), impl="gpu")
    got = int8_matmul(jnp.asarray(inputs.x), *packed, **case.options, impl="gpu")
    ki.assert_same_bits(got, product(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("turn", [1, 2, 4])
def test_every_value_is_widened_on_the_device(turn):
    """One value of each block is not 0, of all 256."""
    x = jnp.ones((8, 128), jnp.bfloat16)
    values = np.zeros((256, 128), np.int8)
    values[np.arange(256), np.arange(256) % 128] = np.arange(-128, 128)
    packed = pack(Int8Weight(jnp.asarray(values), jnp.ones(256)), impl="gpu")
    got = gpu.int8_matmul_gpu(x, *packed, tiling=Tiling(groups=2, turn=turn))
    assert (np.asarray(got, np.float32) == np.arange(-128, 128)).all()
