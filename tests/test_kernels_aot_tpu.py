"""Every TPU kernel compiled for every TPU generation, without a TPU.

The compiler rejects operations it has no code for and buffers beyond VMEM or SMEM.
What it accepts silently, a copy of the pool in front of a kernel, shows in the
temporary memory, so that is bounded here.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import pytest

from pallas_kernels.aot import TPU_TARGETS, compile_for
from pallas_kernels.cases import by_name, int32, num_bytes, tagged
from pallas_kernels.gather_kv import gather_kv
from pallas_kernels.gather_kv.cases import GATHER_CASES
from pallas_kernels.int8_matmul import int8_matmul
from pallas_kernels.int8_matmul.cases import INT8_CASES
from pallas_kernels.paged_attention import paged_attention, tpu_sizes
from pallas_kernels.paged_attention import tpu as attention_tpu
from pallas_kernels.paged_attention.cases import ATTENTION_CASES, AttentionCase
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.select_tokens.cases import SELECT_CASES

pytest.importorskip("libtpu", reason="the TPU compiler is in the wheel libtpu")

# The least VMEM of a generation (v5p, tpu7x).
PHYSICAL_VMEM_BYTES = 64 << 20
# What v5p sets aside for any call (its two cores act as one).
SPARE_BYTES = 1 << 20
# Compiled for every generation; the other shapes for one, as they differ in numbers.
CLASSES = (
    "verify_8k",
    "verify_131k",
    "verify_8k_d64",
    "verify_8k_g8",
    "draft_1638",
    "mixed_ragged",
)
pytestmark = pytest.mark.usefixtures("optimized_programs")
all_targets = pytest.mark.parametrize("target", TPU_TARGETS)
Array = jax.ShapeDtypeStruct


def attention_fn(case: AttentionCase):
    return functools.partial(paged_attention, **case.options, impl="tpu")


ATTENTION_COMPILATIONS = [
    (case, target)
    for case in tagged(ATTENTION_CASES, "tpu")
    for target in (TPU_TARGETS if case.name in CLASSES else TPU_TARGETS[:1])
]


@pytest.mark.parametrize(
    "case, target",
    ATTENTION_COMPILATIONS,
    ids=[f"{case.name}-{target}" for case, target in ATTENTION_COMPILATIONS],
)
def test_attention_compiles_without_copying_the_pool(case, target):
    args = case.shapes
    compiled = compile_for(target, attention_fn(case), *args)
    # Query rows are regrouped by KV head, padded to whole tiles, and put back (a draft
    # lane's 4 rows fill 8); groups are joined. The pool is many times larger.
    # The mass of a head count that is no multiple of 8 leaves its padded layout.
    bound = 8 * num_bytes(args[0]) + SPARE_BYTES
    if case.mass_group is not None and case.num_heads % 8:
        heads = -(-case.num_heads // 8) * 8
        keys = case.table_width * case.page_size
        bound += 4 * case.groups[case.mass_group][0] * heads * keys
    assert compiled.temp_bytes <= bound < num_bytes(args[1]) / 4


@all_targets
def test_float32_attention_compiles(target):
    for name in ("verify_g5", "verify_g8"):  # D = 128 and 64
        case = by_name(ATTENTION_CASES, name)
        compile_for(target, attention_fn(case), *case.shapes)


@ki.each_case(tagged(ATTENTION_CASES, "tpu"))
def test_attention_fits_the_smallest_vmem(case):
    _, pool, table, *_ = case.shapes
    for index, (_, num_queries, *_) in enumerate(case.groups):
        sizes = tpu_sizes.plan_sizes(
            pool.shape,
            pool.dtype,
            table_width=table.shape[1],
            num_q_heads=case.num_heads * case.group_size,
            num_queries=num_queries,
            with_mass=index == case.mass_group,
        )
        limit = sizes.vmem_bytes + tpu_sizes.VMEM_HEADROOM_BYTES
        assert limit <= PHYSICAL_VMEM_BYTES


@all_targets
@ki.each_case(tagged(SELECT_CASES, "tpu"))
def test_selection_compiles(case, target):
    fn = functools.partial(select_tokens, **case.options, impl="tpu")
    assert compile_for(target, fn, *case.shapes).temp_bytes == 0


@all_targets
@ki.each_case(
    [case for case in GATHER_CASES if "tpu" in case.tags or case.dtype == "float32"]
)
def test_gather_compiles_in_place(case, target):
    pool, _, _, indices, _ = case.shapes
    gather = functools.partial(gather_kv, impl="tpu")
    compiled = compile_for(target, gather, *case.shapes, donate_argnums=0)
    assert compiled.alias_bytes == num_bytes(pool)
    # Which half of a word each index wants is listed by target page, 64 numbers in a
    # row of 128; the index lists are padded to whole pages.
    bound = 4 * num_bytes(indices) + SPARE_BYTES
    assert compiled.temp_bytes <= bound
    if "tpu" in case.tags:
        assert bound < num_bytes(pool) / 8


@ki.each_case(tagged(INT8_CASES, "tpu"))
def test_8_bit_product_compiles(case):
    fn = functools.partial(int8_matmul, **case.options, impl="tpu")
    compiled = compile_for(TPU_TARGETS[0], fn, *case.shapes)
    # Rows are padded to whole tiles; no weight is widened in front of the kernel.
    assert compiled.temp_bytes < num_bytes(case.shapes[1]) / 8


@all_targets
def test_a_layer_leaves_the_pool_in_place(target):
    """Attention, selection and gather on one donated pool, as in an engine step."""
    case = by_name(ATTENTION_CASES, "mixed")
    lanes, cap = case.groups[1][0], 410
    first = case.num_lanes - lanes

    def layer(q, pool, table, kv_lengths, q_lengths, drafts):
        result = attention_fn(case)(q, pool, table, kv_lengths, q_lengths)
        lengths = kv_lengths[first:, 0] - q_lengths[first:]
        budgets = jnp.full((lanes,), cap, jnp.int32)
        chosen = select_tokens(result.mass, lengths, budgets, cap=cap, impl="tpu")
        pool = gather_kv(pool, table[first:], drafts, *chosen, impl="tpu")
        return result.out, pool

    args = (*case.shapes, int32(lanes, -(-cap // case.page_size)))
    compiled = compile_for(target, layer, *args, donate_argnums=1)
    pool_bytes = num_bytes(args[1])
    assert compiled.alias_bytes == pool_bytes
    assert compiled.temp_bytes < pool_bytes / 8  # mass, index lists, query rows


# --------------------------------------------------------- the gates can be missed


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target is 'v3'"):
        compile_for("v3", jnp.sin, Array((8,), jnp.float32))


def test_the_gates_see_a_copied_pool():
    case = by_name(ATTENTION_CASES, "draft_1638")
    q, pool, *rest = case.shapes
    num_pages, num_heads, page_size, row_size = pool.shape
    stored = Array((num_pages, page_size, num_heads, row_size), pool.dtype)

    def transposed(q, pool, *rest):
        return attention_fn(case)(q, pool.swapaxes(1, 2), *rest)

    compiled = compile_for("v5e", transposed, q, stored, *rest)
    assert compiled.temp_bytes >= num_bytes(pool)


def test_the_gates_see_too_much_vmem():
    case = by_name(ATTENTION_CASES, "verify_131k")
    fn = functools.partial(
        attention_tpu.paged_attention_tpu,
        **case.options,
        tuning=tpu_sizes.Tuning(vmem_bytes=400 << 20),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        compile_for("v5p", fn, *case.shapes)


def test_the_gates_see_an_operation_without_code():
    with pytest.raises(Exception, match="(?i)not implemented|unimplemented|sort"):
        compile_for("v5e", _sorting_kernel(), Array((8, 128), jnp.float32))


def _sorting_kernel():
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = jax.lax.sort(x_ref[...], dimension=1)

    return pl.pallas_call(kernel, out_shape=Array((8, 128), jnp.float32))
