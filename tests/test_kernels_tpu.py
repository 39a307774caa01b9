"""TPU kernels in the interpreter: parity with the references, races, planted faults.

The interpreter fills memory with NaN, runs copies only when they are waited for,
raises on reads out of bounds and records races. Kernels are compiled once per case
and option set; LLVM optimisation is off, since compiling takes longer than running.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cases import by_name, tagged
from pallas_kernels.gather_kv import gather_kv
from pallas_kernels.gather_kv import tpu as gather_tpu
from pallas_kernels.gather_kv.cases import GATHER_CASES
from pallas_kernels.paged_attention import paged_attention, tpu_sizes
from pallas_kernels.paged_attention import tpu as attention_tpu
from pallas_kernels.paged_attention.cases import ATTENTION_CASES, AttentionCase
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.select_tokens import tpu as select_tpu
from pallas_kernels.select_tokens.cases import SELECT_CASES

# Copies happen when they are waited for, so a missing wait reads NaN ...
ON_WAIT = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
# ... or as soon as they start, so a buffer that is reused too early is overwritten.
EAGER = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")


def compile_interpreted(fn, inputs):
    """Returns `fn` compiled for arrays like `inputs`; raises after a race."""
    lowered = jax.jit(fn).lower(*map(jnp.asarray, inputs))
    compiled = lowered.compile(
        {
            "xla_backend_optimization_level": 0,
            "xla_cpu_parallel_codegen_split_count": 1,
        }
    )

    def run(inputs):
        result = jax.block_until_ready(compiled(*map(jnp.asarray, inputs)))
        assert not interpret_pallas_call.races.races_found, "race between copies"
        return result

    return run


def compile_kernel(kernel, case, inputs, interpret, **options):
    """Returns `kernel` compiled for a case, as `compile_interpreted` does."""
    options = {**case.options, **options, "interpret": interpret}
    return compile_interpreted(functools.partial(kernel, **options), inputs)


def case_params(cases, eager):
    """Returns (case, interpreter) pairs: every small case, and `eager` ones twice."""
    small = tagged(cases, "small") + tagged(cases, "shared")
    pairs = [(case, ON_WAIT) for case in small]
    pairs += [(by_name(cases, name), EAGER) for name in eager]
    ids = [f"{case.name}-{mode.dma_execution_mode}" for case, mode in pairs]
    return pytest.mark.parametrize("case, interpret", pairs, ids=ids)


def assert_faults_are_seen(run, check, inputs, expected, faults, lanes):
    """Asserts that every fault in any lane alone changes the checked result."""
    for fault in faults:
        for lane in lanes:
            with pytest.raises(AssertionError):
                check(run(fault(inputs, lane)), expected)


# ------------------------------------------------------------------ attention


@case_params(ATTENTION_CASES, eager=("page_edges", "verify_long", "verify_g8"))
def test_attention_equals_the_reference_and_shows_faults(case, interpret):
    inputs, expected = ki.attention_and_reference(case)
    kernel = attention_tpu.paged_attention_tpu
    run = compile_kernel(kernel, case, inputs, interpret)
    check = functools.partial(ki.assert_attention_close, dtype=case.dtype)
    actual, again = run(inputs), run(inputs)
    check(actual, expected)
    jax.tree.map(ki.assert_same_bits, actual, again)
    if interpret is ON_WAIT:
        lanes = np.flatnonzero(inputs.kv_lengths.max(1))[-1:]
        faults = ki.ATTENTION_FAULTS
        assert_faults_are_seen(run, check, inputs, expected, faults, lanes)


TUNED = {
    # A prompt chunk in several tiles, whose mass is summed over them.
    "tiles": ("verify_ragged", dict(tile_rows=4)),
    "tiles_of_edges": ("verify_edges", dict(tile_rows=4)),
    # One KV head per grid step, as for very long contexts; blocks of one page.
    "one_head": ("verify_ragged", dict(vmem_bytes=400_000, block_tokens=8)),
    # One lane per call, as for very wide tables.
    "one_lane": ("page_edges", dict(table_bytes=4)),
}


@pytest.mark.parametrize("name", TUNED)
def test_attention_does_not_depend_on_its_tuning(name):
    case_name, sizes = TUNED[name]
    case = by_name(ATTENTION_CASES, case_name)
    inputs = ki.attention_inputs(case)
    inputs.kv_lengths[0, 1] = 1  # a head with fewer keys than queries
    tuning = tpu_sizes.Tuning(**sizes)
    planned = [
        tpu_sizes.plan_sizes(
            inputs.kv_pages.shape,
            inputs.kv_pages.dtype,
            table_width=case.table_width,
            num_q_heads=inputs.q.shape[1],
            num_queries=num_queries,
            with_mass=index == case.mass_group,
            tuning=tuning,
        )
        for index, (_, num_queries, *_) in enumerate(case.groups)
    ]
    if "tile_rows" in sizes:
        assert min(sizes.num_tiles for sizes in planned) > 1
    if "vmem_bytes" in sizes:
        assert planned[case.mass_group].heads == 1
    kernel = attention_tpu.paged_attention_tpu
    run = compile_kernel(kernel, case, inputs, ON_WAIT, tuning=tuning)
    expected = paged_attention(*inputs, **case.options, impl="reference")
    ki.assert_attention_close(run(inputs), expected, case.dtype)


def test_attention_is_reached_through_the_public_function():
    case = by_name(ATTENTION_CASES, "one_key")
    inputs, options = ki.attention_inputs(case), case.options
    actual = paged_attention(*inputs, **options, impl="tpu_interpret")
    expected = paged_attention(*inputs, **options, impl="reference")
    ki.assert_attention_close(actual, expected, case.dtype)


def test_attention_says_what_it_cannot_serve():
    case = AttentionCase(
        name="odd", groups=((1, 1),), kv_lengths=(5,), page_size=4, num_heads=1
    )
    with pytest.raises(NotImplementedError, match="pages of 4 rows of 256 bfloat16"):
        paged_attention(
            *map(jnp.asarray, ki.attention_inputs(case)),
            **case.options,
            impl="tpu",
        )
    with pytest.raises(NotImplementedError, match="narrower table"):
        tpu_sizes.plan_sizes(
            (64, 1, 64, 256),
            jnp.bfloat16,
            table_width=1 << 20,
            num_q_heads=4,
            num_queries=9,
            with_mass=True,
        )


# ------------------------------------------------------------------ selection


@case_params(SELECT_CASES, eager=("few", "recent", "layer"))
def test_selection_equals_the_reference_and_shows_faults(case, interpret):
    inputs, expected = ki.select_and_reference(case)
    run = compile_kernel(select_tpu.select_tokens_tpu, case, inputs, interpret)
    ki.assert_same_selection(run(inputs), expected)
    if interpret is ON_WAIT and case.name != "all_of_it":
        faults = [
            fault
            for fault in ki.SELECT_FAULTS
            if not (case.per_layer and fault is ki.swap_score_heads)
        ]
        check = ki.assert_same_selection
        assert_faults_are_seen(run, check, inputs, expected, faults, lanes=[0])


@pytest.mark.parametrize("scale", [0.0, 1e-38, 3e38])
def test_selection_orders_every_float(scale):
    # All equal, the smallest normal numbers, and the largest of both signs.
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, (1, 2, 256)).astype(np.float32) * np.float32(scale)
    args = (scores, np.array([200], np.int32), np.array([50], np.int32))
    expected = select_tokens(*args, cap=50, impl="reference")
    actual = select_tokens(*args, cap=50, impl="tpu_interpret")
    ki.assert_same_selection(actual, expected)


def test_selection_says_what_it_cannot_serve():
    one = jnp.ones((1,), jnp.int32)
    for shape, word in (((1, 1, 131073), "131073 candidates"), ((1, 32, 131072), "32")):
        with pytest.raises(NotImplementedError, match=word):
            select_tokens(jnp.zeros(shape), one, one, cap=1, impl="tpu")


# --------------------------------------------------------------------- gather


@case_params(
    GATHER_CASES, eager=("few_rows", "few_rows_bf16", "few_rows_d64", "shared_rows")
)
def test_gather_equals_the_reference_and_shows_faults(case, interpret):
    inputs = ki.gather_inputs(case)
    expected = gather_kv(*inputs, impl="reference")
    run = compile_kernel(gather_tpu.gather_kv_tpu, case, inputs, interpret)
    ki.assert_same_bits(run(inputs), expected)
    if interpret is ON_WAIT and not case.is_shared:
        faults, check = ki.GATHER_FAULTS, ki.assert_same_bits
        assert_faults_are_seen(run, check, inputs, expected, faults, lanes=[0])


def test_gather_does_not_depend_on_its_tuning():
    case = by_name(GATHER_CASES, "few_rows_bf16")
    inputs = ki.gather_inputs(case)
    # One lane per call and one head per grid step; one target page is dropped.
    tuning = gather_tpu.Tuning(table_bytes=4, index_bytes=2 * 4 * 48)
    table = inputs.target_table.copy()
    table[0, 1] = len(inputs.kv_pages)
    inputs = inputs._replace(target_table=table)
    kernel = gather_tpu.gather_kv_tpu
    run = compile_kernel(kernel, case, inputs, ON_WAIT, tuning=tuning)
    ki.assert_same_bits(run(inputs), gather_kv(*inputs, impl="reference"))


def test_gather_says_what_it_cannot_serve():
    table, counts = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    indices = jnp.zeros((1, 1, 64), jnp.int32)
    with pytest.raises(NotImplementedError, match="pages of 8 rows of 256 bfloat16"):
        pool = jnp.zeros((2, 1, 8, 256), jnp.bfloat16)
        gather_kv(pool, table, table, indices, counts, impl="tpu")
    with pytest.raises(NotImplementedError, match="lists of 65536 rows"):
        pool = jnp.zeros((2, 1, 64, 256), jnp.bfloat16)
        table = jnp.zeros((1, 1024), jnp.int32)
        indices = jnp.zeros((1, 1, 65536), jnp.int32)
        gather_kv(pool, table, table, indices, counts, impl="tpu")


# ------------------------------------------------------------ the test's own power


def _planted_kernel(out_ref, buffer, sems, source, order):
    copies = [pltpu.make_async_copy(source.at[i], buffer, sems.at[i]) for i in range(2)]
    for step in order:
        if step == "read":
            out_ref[...] = buffer[...]
        else:
            getattr(copies[int(step[-1])], step[:-1])()


@pytest.mark.parametrize(
    "order, sound",
    [
        (("start0", "wait0", "read", "start1", "wait1"), True),
        # The second copy overwrites the buffer while it is read.
        (("start0", "wait0", "start1", "read", "wait1"), False),
        # The buffer is read before the copy has arrived.
        (("start0", "read", "wait0"), False),
    ],
    ids=["sound", "overwritten", "not_awaited"],
)
def test_the_interpreter_sees_planted_races(order, sound):
    def kernel(source, out_ref, buffer, sems):
        _planted_kernel(out_ref, buffer, sems, source, order)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[
            pltpu.VMEM((8, 128), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        interpret=EAGER,
    )
    inputs = (np.ones((2, 8, 128), np.float32),)
    try:
        run = compile_interpreted(call, inputs)
        if sound:
            run(inputs)
        else:
            with pytest.raises(AssertionError, match="race"):
                run(inputs)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
