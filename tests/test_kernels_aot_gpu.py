"""Every GPU kernel compiled for the H100, without one.

The compiler rejects operations it has no code for and shared memory beyond a block's
limit. What it accepts silently is bounded here: registers that spill to local memory,
temporary buffers (a copy of the pool would be one) and shared memory that leaves
room for fewer blocks than the launch counts on.
"""

import functools
import re

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import pytest
from jax.experimental.mosaic.gpu import constraints

from pallas_kernels import timing
from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.cases import NORM_CASES
from pallas_kernels.aot import compile_for
from pallas_kernels.cases import by_name, int32, num_bytes, tagged
from pallas_kernels.code_keys import code_keys
from pallas_kernels.code_keys.cases import CODE_CASES
from pallas_kernels.gather_kv import gather_kv_layers
from pallas_kernels.gather_kv.cases import GATHER_CASES
from pallas_kernels.int8_matmul import Int8Weight, int8_matmul, pack
from pallas_kernels.int8_matmul.cases import INT8_CASES
from pallas_kernels.int8_matmul.gpu import int8_matmul_gpu
from pallas_kernels.int8_matmul.tiling import COPY_REGISTERS, Tiling, choose_tiling
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul.cases import MATMUL_CASES
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.cases import ATTENTION_CASES, AttentionCase
from pallas_kernels.rotate_heads import rotate_heads
from pallas_kernels.rotate_heads.cases import ROTATE_CASES
from pallas_kernels.score_select import score_select
from pallas_kernels.score_select.cases import SCORE_CASES
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.select_tokens.cases import SELECT_CASES
from pallas_kernels.write_rows import write_rows
from pallas_kernels.write_rows.cases import WRITE_CASES

pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is in the plugin")

pytestmark = pytest.mark.usefixtures("optimized_programs")

# Of one H100 multiprocessor; each block takes 1 KB more than it asks for.
SHARED_BYTES = 228 << 10
REGISTERS = 65536
BLOCK_SHARED_BYTES = 227 << 10


def h100_cases(cases):
    """Returns a decorator that calls a test with every case of this device."""
    return ki.each_case(tagged(cases, "h100"))


@pytest.fixture
def compile_h100(tmp_path, monkeypatch):
    """Returns a function that compiles and reports the resources of every kernel."""
    # Writing these out would take a third of the time, and nobody reads them.
    monkeypatch.setattr(constraints.ConstraintSystem, "__str__", lambda self: "")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compile_one(fn, args, **options):
        result = compile_for("h100", fn, *args, **options)
        kernels = {}
        for path in sorted(tmp_path.glob("*.ptxas")):
            text = path.read_text()
            shared = path.with_suffix("").with_suffix(".resources.txt").read_text()
            kernels[path.stem.rsplit("_", 1)[0]] = dict(
                registers=int(re.search(r"Used (\d+) registers", text)[1]),
                spilled=int(re.search(r"(\d+) bytes spill stores", text)[1]),
                is_serialized="wgmma.mma_async instructions are serialized" in text,
                shared=int(re.search(r"smem_scratch_bytes=(\d+)", shared)[1]),
            )
        assert kernels, "the compiler reported no kernel"
        for path in tmp_path.glob("*.after_layout_inference.txt"):
            assert_swizzles_are_safe(path.read_text())
        return result, kernels

    return compile_one


def assert_swizzles_are_safe(text):
    """Asserts that swizzled shared memory is copied in multiples of 8 rows only.

    Left to itself the compiler takes fewer rows where copies need it; a swizzled copy
    of those goes astray on the device, which no interpreter shows.
    """
    tiles = re.findall(r"tile<\[(\d+), (\d+)\]>, #mosaic_gpu.swizzle", text)
    assert all("8" in tile for tile in tiles), f"tiles of shared memory: {set(tiles)}"


def assert_fits(kernel, warpgroups=1, blocks=1):
    """Asserts that a multiprocessor holds `blocks` of a kernel that does not spill."""
    assert kernel["spilled"] == 0
    assert not kernel["is_serialized"]  # products of the matrix unit
    assert kernel["shared"] + 1024 <= BLOCK_SHARED_BYTES  # and its barriers
    assert blocks * (kernel["shared"] + 2 * 1024) <= SHARED_BYTES
    allocated = -(-kernel["registers"] // 8) * 8
    assert blocks * warpgroups * 128 * allocated <= REGISTERS


@h100_cases(ATTENTION_CASES)
def test_attention_compiles(compile_h100, case):
    attend = functools.partial(paged_attention, **case.options, impl="gpu")
    args = case.shapes
    result, kernels = compile_h100(attend, args)
    has_chunks = case.groups[-1][1] > 64
    expected = {"paged_attention_chunks"} if has_chunks else set()
    if len(case.groups) > has_chunks:
        expected |= {"paged_attention", "paged_attention_finish"}
    assert set(kernels) == expected
    if has_chunks:
        assert_fits(kernels["paged_attention_chunks"], warpgroups=3)
        # Chunks go to the output of the other launches, which is not copied.
        assert " copy(" not in result.compiled.as_text()
    if "paged_attention" in expected:
        # Two blocks of a multiprocessor hide each other's latency.
        assert_fits(kernels["paged_attention"], blocks=2)
        assert_fits(kernels["paged_attention_finish"], blocks=4)
    else:
        assert result.temp_bytes <= 128  # the order of the lanes
    # Packed queries, one part per segment and CTA, log sums: small beside the pool.
    bound = 8 * num_bytes(args[0]) + (24 << 20)
    if case.mass_group is not None:
        bound += mass_bytes(case)
    bound += piece_bytes(case)
    assert result.temp_bytes <= bound
    assert result.temp_bytes < num_bytes(args[1])


def piece_bytes(case: AttentionCase) -> int:
    """Returns the bytes of all pieces: rows, eight at a time, and 64 log sums each."""
    total = 0
    for lanes, queries, *piece in case.groups:
        if piece:
            pieces = -(-case.table_width * case.page_size // piece[0])
            rows = -(-queries * case.group_size // 8) * 8
            per_piece = 2 * rows * case.head_size + 4 * 64
            total += lanes * case.num_heads * pieces * per_piece
    return total


def mass_bytes(case: AttentionCase) -> int:
    """Returns the bytes of what is stored for the mass: 12 bits per row and key."""
    lanes, queries, *_ = case.groups[case.mass_group]
    rows = (2 if case.mass_rows == "edges" else queries) * case.group_size
    keys = -(-case.table_width * case.page_size // 2048) * 2048
    per_key = 1.5 * rows + 4 * 128 / 64 + 4  # maxima of rows; padded mass
    return int(lanes * case.num_heads * keys * per_key)


@h100_cases(SELECT_CASES)
def test_selection_compiles(compile_h100, case):
    select = functools.partial(select_tokens, **case.options, impl="gpu")
    result, kernels = compile_h100(select, case.shapes)
    assert_fits(kernels["select_tokens"], warpgroups=4)
    # A list per layer needs the sum over heads and one list before it is repeated.
    scores, lengths, _ = case.shapes
    summed = num_bytes(scores) // case.num_heads + 4 * lengths.size * (case.cap + 64)
    assert result.temp_bytes <= (2 * summed if case.per_layer else 0)


@ki.each_case(
    tuple(by_name(SCORE_CASES, n) for n in ("score_344_15k", "score_1_5b_8k"))
    + tuple(by_name(SCORE_CASES, n) for n in ("score_456_2k_2_bits", "score_g7"))
)
def test_scoring_compiles(compile_h100, case):
    """Four CTAs of a multiprocessor: all of a step's lanes and heads at a time."""
    select = functools.partial(score_select, **case.options, impl="gpu")
    result, kernels = compile_h100(select, case.shapes)
    assert_fits(kernels["score_select"], blocks=4)
    assert result.temp_bytes <= 64  # the addresses of two results


@h100_cases(CODE_CASES)
def test_coding_compiles_in_place(compile_h100, case):
    code = functools.partial(code_keys, **case.options, impl="gpu")
    result, kernels = compile_h100(code, case.shapes, donate_argnums=0)
    assert_fits(kernels["code_keys"], blocks=2)
    assert result.temp_bytes == 0
    assert result.alias_bytes == num_bytes(case.shapes[0])


def assert_gather_is_in_place(compile_h100, case, num_layers):
    pool, *tables, indices, counts = case.shapes
    lists = (int32(num_layers, *array.shape) for array in (indices, counts))
    args = ((pool,) * num_layers, *tables, *lists)
    gather = functools.partial(gather_kv_layers, impl="gpu")
    result, kernels = compile_h100(gather, args, donate_argnums=0)
    assert_fits(kernels["gather_kv"], blocks=8)
    assert result.temp_bytes == 0
    assert result.alias_bytes == num_layers * num_bytes(pool)


@h100_cases(GATHER_CASES)
def test_gather_compiles_in_place(compile_h100, case):
    assert_gather_is_in_place(compile_h100, case, num_layers=1)


def test_gather_of_several_layers_compiles_in_place(compile_h100):
    case = by_name(GATHER_CASES, "gather_512b")
    assert_gather_is_in_place(compile_h100, case, num_layers=8)


@h100_cases(WRITE_CASES)
def test_write_compiles_in_place(compile_h100, case):
    write = functools.partial(write_rows, **case.options, impl="gpu")
    result, kernels = compile_h100(write, case.shapes, donate_argnums=0)
    assert_fits(kernels["write_rows"], blocks=8)
    assert result.temp_bytes == 0
    assert result.alias_bytes == num_bytes(case.shapes[0])


@h100_cases(ROTATE_CASES)
def test_rotation_compiles(compile_h100, case):
    rotate = functools.partial(rotate_heads, eps=1e-6, **case.options, impl="gpu")
    result, kernels = compile_h100(rotate, case.shapes)
    assert_fits(kernels["rotate_heads"], blocks=4)
    assert result.temp_bytes <= 64  # the addresses of two results


@ki.each_case(NORM_CASES)
def test_norm_compiles(compile_h100, case):
    add = functools.partial(add_norm, eps=1e-6, impl="gpu")
    result, kernels = compile_h100(add, case.shapes)
    # Eight parts come with few tokens only.
    assert_fits(kernels["add_norm"], blocks=2 if case.num_parts > 4 else 4)
    assert result.temp_bytes <= 64  # the addresses of two results


@h100_cases(MATMUL_CASES)
def test_product_compiles(compile_h100, case):
    result, kernels = compile_h100(functools.partial(matmul, impl="gpu"), case.shapes)
    assert_fits(kernels["matmul"], warpgroups=3)
    # Rows of a number that 8 does not divide are padded, and the result is cut.
    is_padded = case.num_tokens % 8 != 0
    bound = 2 * (case.num_tokens + 8) * sum(case.weight) if is_padded else 0
    assert result.temp_bytes <= bound
    assert (" pad(" in result.compiled.as_text()) == is_padded


def packed_shapes(case):
    """Returns the arrays of an 8-bit product as the GPU kernel takes them."""
    x, *weight = case.shapes
    return x, *jax.eval_shape(functools.partial(pack, impl="gpu"), Int8Weight(*weight))


@h100_cases(INT8_CASES)
def test_8_bit_product_compiles(compile_h100, case):
    multiply = functools.partial(int8_matmul, **case.options, impl="gpu")
    result, kernels = compile_h100(multiply, packed_shapes(case))
    tiling = choose_tiling(case.num_tokens, *case.weight, case.parts or 1)
    kernel = kernels["int8_matmul"]
    assert_fits(kernel, warpgroups=tiling.groups + 1, blocks=tiling.ctas)
    # What the choice counts on.
    resident = tiling.resident(case.num_tokens)
    assert_fits(kernel | dict(shared=0), warpgroups=tiling.groups + 1, blocks=resident)
    # Rows of a number that 8 does not divide are padded, and the result is cut.
    is_padded = case.num_tokens % 8 != 0
    bound = 2 * (case.num_tokens + 8) * sum(case.weight) if is_padded else 0
    assert result.temp_bytes <= bound


def test_8_bit_product_compiles_with_steps_widened_ahead(compile_h100):
    """Its warpgroups ask for no more registers than a CTA has, or it would hang."""
    case = by_name(INT8_CASES, "int8_qwen3_8b_out_64")
    tiling = Tiling(groups=2, parts=4, turn=2)
    multiply = functools.partial(int8_matmul_gpu, parts=4, tiling=tiling)
    _, kernels = compile_h100(multiply, packed_shapes(case))
    kernel = kernels["int8_matmul"]
    assert_fits(kernel, warpgroups=3)
    wanted = tiling.groups * tiling.registers + COPY_REGISTERS
    assert wanted <= (tiling.groups + 1) * kernel["registers"]


def test_the_rate_of_copies_is_that_of_the_device():
    """No kernel, whose own limits would be taken for those of the memory."""
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    text = compile_for("h100", timing.copy, x).compiled.as_text()
    entry = text.partition("\nENTRY ")[2]
    assert " copy(" in entry and " fusion(" not in entry
