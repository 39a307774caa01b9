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
import pytest

from pallas_kernels.add_norm import add_norm
from pallas_kernels.aot import compile_for
from pallas_kernels.cases import (
    ATTENTION_CASES,
    GATHER_CASES,
    NORM_CASES,
    ROTATE_CASES,
    WRITE_CASES,
    AttentionCase,
    GatherCase,
    NormCase,
    RotateCase,
    by_name,
)
from pallas_kernels.gather_kv import gather_kv_layers
from pallas_kernels.paged_attention import LaneGroup, paged_attention
from pallas_kernels.prefill_cases import PREFILL_CASES
from pallas_kernels.rotate_heads import rotate_heads
from pallas_kernels.select_cases import SELECT_CASES, SelectCase
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.write_rows import write_rows

pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is in the plugin")

# Of one H100 multiprocessor; each block takes 1 KB more than it asks for.
SHARED_BYTES = 228 << 10
REGISTERS = 65536
BLOCK_SHARED_BYTES = 227 << 10
Array = jax.ShapeDtypeStruct
ATTENTION = (
    "verify_8k",
    "verify_32k",
    "verify_131k",
    "verify_8k_edges",
    "draft_410",
    "draft_1638",
    "mixed",
    "mixed_ragged",
    "step_2560",
    "verify_8k_d64",
    "verify_8k_g5",
    "verify_8k_g8",
    "plain_8k",
    "prefill_12k",
    "prefill_step",
    "prefill_d64",
    "prefill_g5",
)
SELECT = ("select_8k", "select_8k_layer", "select_32k", "select_40k", "select_131k")
WRITE = ("write_plain", "write_136", "write_d64")
ROTATE = (
    "rotate_ragged",
    "rotate_136",
    "rotate_136_parts",
    "rotate_d64",
    "rotate_2184",
)
GATHER = ("gather_512b", "gather_410", "gather_d64")


def int32(*shape):
    return Array(shape, jnp.int32)


def num_bytes(array):
    return array.size * array.dtype.itemsize


@pytest.fixture
def compile_h100(tmp_path, monkeypatch):
    """Returns a function that compiles and reports the resources of every kernel."""
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


def attention_args(case: AttentionCase):
    q_heads, lanes = case.num_heads * case.group_size, case.num_lanes
    pool = (case.num_used_pages + 3, case.num_heads, case.page_size, 2 * case.head_size)
    return (
        Array((case.num_tokens, q_heads, case.head_size), jnp.bfloat16),
        Array(pool, jnp.bfloat16),
        int32(lanes, case.table_width),
        int32(lanes, case.num_heads),
        int32(lanes),
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_compiles(compile_h100, name):
    case = by_name(ATTENTION_CASES + PREFILL_CASES, name)
    attend = functools.partial(
        paged_attention,
        groups=tuple(LaneGroup(*group) for group in case.groups),
        mass_group=case.mass_group,
        mass_rows=case.mass_rows,
        impl="gpu",
    )
    args = attention_args(case)
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
    assert result.temp_bytes <= bound
    assert result.temp_bytes < num_bytes(args[1])


def mass_bytes(case: AttentionCase) -> int:
    """Returns the bytes of what is stored for the mass: 12 bits per row and key."""
    lanes, queries = case.groups[case.mass_group]
    rows = (2 if case.mass_rows == "edges" else queries) * case.group_size
    keys = -(-case.table_width * case.page_size // 2048) * 2048
    per_key = 1.5 * rows + 4 * 128 / 64 + 4  # maxima of rows; padded mass
    return int(lanes * case.num_heads * keys * per_key)


@pytest.mark.parametrize("name", SELECT)
def test_selection_compiles(compile_h100, name):
    case: SelectCase = by_name(SELECT_CASES, name)
    lanes = len(case.lengths)
    select = functools.partial(
        select_tokens,
        cap=case.cap,
        num_recent=case.num_recent,
        per_layer=case.per_layer,
        impl="gpu",
    )
    scores = Array((lanes, case.num_heads, case.num_candidates), jnp.float32)
    result, kernels = compile_h100(select, (scores, int32(lanes), int32(lanes)))
    assert_fits(kernels["select_tokens"], warpgroups=4)
    # A list per layer needs the sum over heads and one list before it is repeated.
    summed = num_bytes(scores) // case.num_heads + 4 * lanes * (case.cap + 64)
    assert result.temp_bytes <= (2 * summed if case.per_layer else 0)


@pytest.mark.parametrize(
    ("name", "num_layers"), [*((name, 1) for name in GATHER), (GATHER[0], 8)]
)
def test_gather_compiles_in_place(compile_h100, name, num_layers):
    case: GatherCase = by_name(GATHER_CASES, name)
    lanes, ps = case.num_lanes, case.page_size
    widths = [-(-rows // ps) for rows in (case.context, case.cap)]
    shape = (lanes * sum(widths), case.num_heads, ps, 2 * case.head_size)
    pool = Array(shape, jnp.bfloat16)
    args = (
        (pool,) * num_layers,
        *(int32(lanes, width) for width in widths),
        int32(num_layers, lanes, case.num_heads, case.cap),
        int32(num_layers, lanes, case.num_heads),
    )
    gather = functools.partial(gather_kv_layers, impl="gpu")
    result, kernels = compile_h100(gather, args, donate_argnums=0)
    assert_fits(kernels["gather_kv"], blocks=8)
    assert result.temp_bytes == 0
    assert result.alias_bytes == num_layers * num_bytes(pool)


@pytest.mark.parametrize("name", WRITE)
def test_write_compiles_in_place(compile_h100, name):
    case = by_name(WRITE_CASES, name)
    rows = Array((case.num_rows, case.num_heads, 2 * case.head_size), jnp.bfloat16)
    shape = (case.num_pages, case.num_heads, case.page_size, 2 * case.head_size)
    pool, place = Array(shape, jnp.bfloat16), int32(case.num_places, 1)
    write = functools.partial(write_rows, copies_from=case.copies_from, impl="gpu")
    args = (pool, rows, place, place)
    result, kernels = compile_h100(write, args, donate_argnums=0)
    assert_fits(kernels["write_rows"], blocks=8)
    assert result.temp_bytes == 0
    assert result.alias_bytes == num_bytes(pool)


@pytest.mark.parametrize("name", ROTATE)
def test_rotation_compiles(compile_h100, name):
    case: RotateCase = by_name(ROTATE_CASES, name)
    table = Array((case.num_tokens, case.head_size // 2), jnp.float32)
    dtype = jnp.dtype(case.dtype)
    scales = [Array((case.head_size,), dtype)] * 2 if case.is_normed else []
    args = (Array(*case.projection), table, table, *scales)
    rotate = functools.partial(rotate_heads, eps=1e-6, dtype=dtype, impl="gpu")
    result, kernels = compile_h100(rotate, args)
    assert_fits(kernels["rotate_heads"], blocks=4)
    assert result.temp_bytes <= 64  # the addresses of two results


@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
def test_norm_compiles(compile_h100, case: NormCase):
    x, scale = (Array(s, jnp.dtype(case.dtype)) for s in (case.shape, case.shape[1:]))
    y = Array((case.num_parts, *case.shape), jnp.float32) if case.num_parts else x
    add = functools.partial(add_norm, eps=1e-6, impl="gpu")
    result, kernels = compile_h100(add, (x, y, scale))
    # Eight parts come with few tokens only.
    assert_fits(kernels["add_norm"], blocks=2 if case.num_parts > 4 else 4)
    assert result.temp_bytes <= 64  # the addresses of two results
