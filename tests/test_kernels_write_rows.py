"""The store of new KV rows: the reference by hand, the GPU kernel interpreted."""

import functools

import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import run_with_races

from pallas_kernels.aot import compile_for
from pallas_kernels.cases import by_name, num_bytes, tagged
from pallas_kernels.write_rows import write_rows
from pallas_kernels.write_rows.cases import WRITE_CASES
from pallas_kernels.write_rows.gpu import write_rows_gpu

# Bits are compared, and the quickest code for a CPU rounds what it merely moves.
pytestmark = pytest.mark.usefixtures("optimized_programs")

SMALL = tagged(WRITE_CASES, "small")
small_cases = ki.each_case(SMALL)
write = functools.partial(write_rows, impl="reference")


def int32(*rows):
    return jnp.asarray(rows, jnp.int32)


def numbered_pool(num_pages):
    """Returns pages of two rows, one head, D = 1: K 10 * page + row, V negative."""
    page, _, row, half = np.indices((num_pages, 1, 2, 2))
    return jnp.asarray(np.where(half == 0, 1.0, -1.0) * (10 * page + row), jnp.float32)


def test_write_by_hand():
    # Row 0 goes to row 1 of page 2; row 1 to row 0 of page 0, and, as the one that is
    # stored again, to row 0 of page 1.
    rows = jnp.asarray([[[50.0, 51.0]], [[60.0, 61.0]]])
    got = write(numbered_pool(3), rows, int32([2], [0], [1]), int32([1], [0], [0]),
                copies_from=1)  # fmt: skip
    assert got[:, 0, :, 0].tolist() == [[60, 1], [60, 11], [20, 50]]
    assert got[:, 0, :, 1].tolist() == [[61, -1], [61, -11], [-20, 51]]


def test_write_drops_rows_without_a_page():
    rows = jnp.asarray([[[50.0, 51.0]], [[60.0, 61.0]], [[70.0, 71.0]]])
    pool = numbered_pool(2)
    got = write(pool, rows, int32([2], [-1], [1]), int32([0], [0], [1]))
    assert got[:, 0, :, 0].tolist() == [[0, 1], [10, 70]]


@small_cases
def test_write_agrees_with_numpy_bit_for_bit(case):
    inputs = ki.write_inputs(case)
    expected = inputs.kv_pages.copy()
    for place, head in np.ndindex(case.num_places, case.num_heads):
        copied = place - case.num_rows
        row = place if copied < 0 else case.copies_from + copied
        column = min(head, inputs.pages.shape[1] - 1)
        page, offset = inputs.pages[place, column], inputs.offsets[place, column]
        if 0 <= page < case.num_pages:
            expected[page, head, offset] = inputs.rows[row, head]
    ki.assert_same_bits(write(*inputs, **case.options), expected)


@small_cases
def test_write_on_a_gpu_equals_the_reference(case):
    inputs, options = ki.write_inputs(case), case.options
    actual = run_with_races(write_rows_gpu, inputs, **options)
    ki.assert_same_bits(actual, write(*inputs, **options))


def test_write_on_a_gpu_shows_faults():
    case = by_name(WRITE_CASES, "write_step")
    inputs, options = ki.write_inputs(case), case.options
    expected = write(*inputs, **options)
    run = functools.partial(write_rows, impl="gpu_interpret")
    offsets = inputs.offsets.copy()
    offsets[3] ^= 1
    pages = inputs.pages.copy()
    pages[5] = case.num_pages  # dropped
    faults = (
        (inputs._replace(offsets=offsets), options),
        (inputs._replace(pages=pages), options),
        (inputs._replace(rows=inputs.rows[:, ::-1].copy()), options),
        (inputs, dict(copies_from=options["copies_from"] - 1)),
    )
    for faulty, options in faults:
        with pytest.raises(AssertionError):
            ki.assert_same_bits(run(*map(jnp.asarray, faulty), **options), expected)


@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
def test_write_is_in_place_on_a_tpu(target):
    pytest.importorskip("libtpu")
    case = by_name(WRITE_CASES, "write_136")
    fn = functools.partial(write_rows, impl="tpu", **case.options)
    compiled = compile_for(target, fn, *case.shapes, donate_argnums=0)
    pool_bytes = num_bytes(case.shapes[0])
    assert compiled.alias_bytes == pool_bytes
    assert compiled.temp_bytes < pool_bytes / 64


@pytest.mark.usefixtures("no_type_checks")
def test_write_rejects_what_does_not_fit():
    pool, rows, one = numbered_pool(2), jnp.zeros((2, 1, 2)), int32([0], [1])
    for args, options, word in (
        ((pool[0], rows, one, one), {}, "kv_pages has shape"),
        ((pool, rows[0], one, one), {}, "rows has shape"),
        ((pool, rows.astype(jnp.bfloat16), one, one), {}, "rows has dtype"),
        ((pool, rows, one[0], one), {}, "pages has shape"),
        ((pool, rows, one, one[:1]), {}, "offsets has shape"),
        ((pool, rows, one[:1], one[:1]), {}, "there are 2 rows, but pages has 1"),
        ((pool, rows, one, one), dict(copies_from=3), "copies_from is 3"),
    ):
        with pytest.raises(ValueError, match=word):
            write(*args, **options)


def test_write_on_a_gpu_refuses_other_head_sizes():
    with pytest.raises(NotImplementedError, match="head size is 1:"):
        rows = jnp.zeros((1, 1, 2))
        write_rows(numbered_pool(2), rows, int32([0]), int32([0]), impl="gpu_interpret")


@pytest.mark.gpu
@ki.each_case(WRITE_CASES)
def test_write_on_the_device(case):
    inputs, options = ki.write_inputs(case), case.options
    inputs = tuple(map(jnp.asarray, inputs))
    expected = write(*inputs, **options)
    ki.assert_same_bits(write_rows(*inputs, **options, impl="gpu"), expected)
