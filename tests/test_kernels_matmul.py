"""The product of many rows: the reference by hand, the GPU kernel interpreted.

Inputs are small whole numbers, of which every order gives the same sum, or such that
another order gives another one. The interpreter's rows end in NaN.
"""

import dataclasses
import functools
import json
import sys

import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import run_with_races

from pallas_kernels import timing
from pallas_kernels.cases import by_name, tagged
from pallas_kernels.matmul import bench, gpu, matmul, sweep
from pallas_kernels.matmul.cases import MATMUL_CASES
from pallas_kernels.matmul.gpu_schedule import (
    MatmulConfig,
    choose_config,
    make_table,
)

SMALL = tagged(MATMUL_CASES, "small")
FEW = functools.partial(MatmulConfig, num_ctas=4)
# All ways to cut a tile; one and two CTAs that share; more steps than stages.
CONFIGS = dict(
    pairs=FEW(),
    narrow=FEW(tile_columns=192),
    narrower=FEW(tile_columns=128, num_stages=6),
    alone=FEW(cluster=1, band=1),
    by_columns=FEW(by_rows=False, num_stages=2),
    tall=FEW(tile_rows=256, tile_columns=128, num_stages=3),
    deep=FEW(depth=128, num_stages=2, band=2),
)
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def product(x, weight):
    """The product, exact and rounded once."""
    exact = x.astype(np.float32) @ weight.astype(np.float32)
    return exact.astype(jnp.bfloat16)


def interpreted(x, weight, **options):
    return run_with_races(gpu.matmul_gpu, (x, weight), **options)


def test_product_by_hand():
    x = jnp.asarray([[1, 2, 3], [0, -1, 0.5]], jnp.bfloat16)
    weight = jnp.asarray([[1, 4], [0, 2], [-1, 8]], jnp.bfloat16)
    for impl in ("reference", "tpu_interpret"):
        got = matmul(x, weight, impl=impl)
        assert got.dtype == jnp.bfloat16
        assert got.tolist() == [[-2, 32], [-0.5, 2]]


@pytest.mark.parametrize("impl", ["reference", "gpu_interpret"])
def test_sums_are_float32_and_rounded_once(impl):
    # 256 + 1 + 1: bfloat16 would lose each 1; 256 + 1 alone rounds to even.
    x = np.zeros((2, 64), jnp.bfloat16)
    x[0, :3], x[1, :2] = (256, 1, 1), (256, 1)
    got = matmul(x, np.ones((64, 64), jnp.bfloat16), impl=impl)
    assert got[:, 0].tolist() == [258, 256]


@ki.each_case(SMALL)
def test_product_on_a_gpu_is_the_reference(case):
    x, weight = ki.matmul_inputs(case)
    expected = matmul(x, weight, impl="reference")
    ki.assert_same_bits(expected, product(x, weight))
    ki.assert_same_bits(interpreted(x, weight), expected)


@configs
def test_every_way_to_cut_gives_the_product(config):
    x, weight = ki.whole_numbers(300, 384, 576)
    got = interpreted(x, weight, config=config)
    ki.assert_same_bits(got, product(x, weight))


def ordered_numbers(num_rows, num_columns):
    """Three steps of 64 inputs: large, ones that these swallow, the large ones negated.

    The sum of a step is exact in any order, since processors that interpret a kernel
    have orders of their own; that of the steps is not.
    """
    x, weight = ki.whole_numbers(num_rows, 192, num_columns)
    x[:, :64] *= 2.0**20
    x[:, 128:], weight[128:] = -x[:, :64], weight[:64]
    return x, weight


def test_another_order_of_the_inputs_gives_other_bits():
    """What the test below can see: a sum that is cut, or taken backwards."""
    x, weight = ordered_numbers(8, 64)
    one, other = (
        interpreted(a, b) for a, b in ((x, weight), (x[:, ::-1], weight[::-1]))
    )
    assert not np.array_equal(one, other)
    halves = [
        interpreted(x[:, part], weight[part]) for part in (slice(128), slice(128, None))
    ]
    assert not np.array_equal(one, np.add(*(np.asarray(h, np.float32) for h in halves)))


def test_bits_of_a_row_follow_from_the_row():
    x, weight = ordered_numbers(520, 320)
    every = interpreted(x, weight, config=FEW())
    for num_rows in (1, 64, 136, 256):
        some = interpreted(x[:num_rows], weight, config=FEW())
        ki.assert_same_bits(some, every[:num_rows])
    turned = interpreted(x[::-1], weight, config=FEW(tile_columns=192))
    ki.assert_same_bits(turned[::-1], every)


def test_a_row_of_nan_is_the_only_one():
    x, weight = ki.whole_numbers(300, 128, 192)
    x[[5, 70, 127, 299]] = np.nan
    got = np.asarray(interpreted(x, weight, config=FEW()), np.float32)
    is_nan = np.isnan(got)
    assert is_nan[[5, 70, 127, 299]].all() and is_nan.sum() == 4 * 192
    rest = ~is_nan.any(1)
    expected = np.asarray(product(x[rest], weight), np.float32)
    np.testing.assert_array_equal(got[rest], expected)


def covered(num_rows, num_columns, config):
    """How often each tile is made, and the tiles beyond the last one."""
    tiles = config.tiles(num_rows, num_columns)
    count, beyond = np.zeros(tiles, int), 0
    for cta in make_table(num_rows, num_columns, config):
        for row, column, _ in cta[1 : 1 + cta[0, 0]]:
            if row < tiles[0] and column < tiles[1]:
                count[row, column] += 1
            else:
                beyond += 1
    return count, beyond


SIZES = [(1, 64), (64, 960), (600, 576), (2048, 6144), (2072, 4096), (2176, 1536)]


@configs
@pytest.mark.parametrize("sizes", [*SIZES, (8192, 24576)])
def test_every_tile_is_made_once(config, sizes):
    config = dataclasses.replace(config, num_ctas=132)
    count, beyond = covered(*sizes, config)
    assert (count == 1).all()
    assert beyond <= (config.cluster - 1) * max(1, count.shape[0] % 2)
    table = make_table(*sizes, config)
    pairs = table.reshape(-1, config.cluster, *table.shape[1:])
    assert (pairs[:, :, 0, 0] == pairs[:, :1, 0, 0]).all()  # in step
    # What a pair shares is what the copies of both take.
    for pair in pairs:
        for tiles in pair[:, 1 : 1 + pair[0, 0, 0]].transpose(1, 0, 2):
            shared = 0 if tiles[0, 2] else 1
            assert len(set(tiles[:, shared])) == 1


def test_half_rows_do_not_cost_a_round():
    """24 rows more than 2,048 go to the multiprocessors that would have nothing."""
    for columns, most in ((6144, 4), (4096, 3)):
        config = MatmulConfig(cluster=1)
        table = make_table(2072, columns, config)
        assert table[:, 0, 0].max() <= most
        whole = (table[:, 1:, 0] < 16) & (
            np.arange(1, table.shape[1]) <= table[:, 0, :1]
        )
        assert whole.sum(1).max() == -(-16 * columns // 256 // 132)


def test_chosen_tiles_divide_what_models_have():
    for case in tagged(MATMUL_CASES, "h100"):
        config = choose_config(case.num_tokens, case.weight[1], case.weight[0])
        assert case.weight[0] % config.depth == 0
        assert config.shared_bytes <= 227 << 10


# What a fault in the kernel would do. The first two were put into it by hand as well
# (one step copied in place of another; chunks stored at each other's place): every
# comparison with the product failed that has more than one step, or stores at all.
def skip_a_step(x, weight):
    """One step of inputs is left out."""
    return np.where(np.arange(x.shape[1]) // 64 == 1, np.zeros_like(x), x), weight


def swap_tiles(x, weight):
    """Two tiles of outputs are stored at each other's place."""
    return x, np.concatenate([weight[:, 256:], weight[:, :256]], axis=1)


def next_rows(x, weight):
    """Rows of the other warpgroup."""
    return np.roll(x, 64, axis=0), weight


@pytest.mark.parametrize("fault", [skip_a_step, swap_tiles, next_rows])
def test_product_on_a_gpu_shows_faults(fault):
    x, weight = ki.whole_numbers(136, 192, 512)
    got = interpreted(*fault(x, weight), config=FEW())
    with pytest.raises(AssertionError):
        ki.assert_same_bits(got, product(x, weight))


@pytest.mark.usefixtures("no_type_checks")
def test_product_rejects_what_does_not_fit():
    x, weight = ki.whole_numbers(2, 64, 64)
    for args, word in (
        ((x[0], weight), "x has shape"),
        ((x[:0], weight), "no axis may be empty"),
        ((x, weight[:3]), "weight has shape"),
        ((x.astype(np.float32), weight), "x has dtype"),
        ((x, weight.astype(np.float32)), "weight has dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            matmul(*args, impl="reference")


def test_product_on_a_gpu_refuses_other_sizes():
    for sizes, word in (((2, 96, 64), "96 inputs"), ((2, 64, 96), "96 outputs")):
        with pytest.raises(NotImplementedError, match=word):
            matmul(*ki.whole_numbers(*sizes), impl="gpu_interpret")


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(tile_rows=192), "96 x 256"),
        (dict(tile_rows=256), "128 x 256"),
        (dict(depth=32), "depth is 64 or 128"),
        (dict(cluster=3), "cluster is 1 or 2"),
        (dict(band=3), "band is 3"),
        (dict(num_stages=5), "shared memory"),
    ],
)
def test_config_rejects_other_sizes(options, word):
    with pytest.raises(ValueError, match=word):
        MatmulConfig(**options)


def test_the_benchmark_times_and_compares(monkeypatch):
    for name, value in (("MIN_PROGRAMS", 1), ("REPEATS", 1), ("SECONDS", 0.0)):
        monkeypatch.setattr(timing, name, value)
    case = dataclasses.replace(bench.CASES[0], num_tokens=8, weight=(64, 128))
    rates = timing.Rates(read=1e12, copy=1e12)
    result = bench.bench(case, impl="reference", rates=rates, num_layers=2)
    assert result["operations"] == 2 * 8 * 64 * 128
    assert 0 < result["error"] < 4e-3
    assert min(result["us"], result["tflop_per_s"], result["xla_tflop_per_s"]) > 0


@pytest.mark.gpu
@ki.each_case([by_name(MATMUL_CASES, "matmul_odd_rows"), *SMALL])
def test_product_on_the_device(case):
    x, weight = ki.matmul_inputs(case)
    ki.assert_same_bits(matmul(x, weight, impl="gpu"), product(x, weight))


def test_the_sweep_compares_and_times(monkeypatch, tmp_path, capsys):
    """On a CPU, by the reference in place of the kernel; one product has a fault."""

    def make(x, weight, config):
        made = matmul(x, weight, impl="reference")
        return made.at[3, 5].set(0.25) if config.tile_rows == 256 else made

    for name, value in dict(
        matmul_gpu=make,
        LAYERS={"qwen3_8b": {"out": (64, 128)}},
        _SECONDS=0.0,
        _REPEATS=1,
        _LIBRARY=None,
        _UNTUNED=None,
    ).items():
        monkeypatch.setattr(sweep, name, value)
    path = tmp_path / "matmul.json"
    arguments = ["sweep", "--models", "qwen3_8b", "--rows", "128", "2072"]
    arguments += ["--tries", *sweep._CONFIGS]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(path)])
    sweep.main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    few, many = json.loads(path.read_text())["rows"]
    assert few["numbers"] == 128 * 128 and len(few["tflop_per_s"]) == 1
    assert many["differing"].pop("tall") == many["differing"].pop("tall alone") == 1
    assert set(many["differing"].values()) == {0}
    for row in (few, many):
        assert 0 < row["error"] < 4e-3 and row["beyond_one_unit"] == 0
        assert row["first_rows_differing"] == 0
    assert many["moved_rows_differing"] == 0 and "xla" in many["tflop_per_s"]
