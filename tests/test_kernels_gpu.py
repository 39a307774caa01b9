"""GPU kernels in the interpreter: parity with the references, races, planted faults.

The interpreter runs the warpgroups of a block as threads, simulates barriers and
asynchronous copies, and records races. Single-thread steps of the selection kernel
have no interpreted form and are replaced there; the tests marked `gpu` check the
kernels as compiled, on the device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import PLAIN, RACES, compile_interpreted

from pallas_kernels.cases import by_name, tagged
from pallas_kernels.gather_kv import gather_kv, gather_kv_layers
from pallas_kernels.gather_kv import gpu as gather_gpu
from pallas_kernels.gather_kv.cases import GATHER_CASES
from pallas_kernels.paged_attention import gpu as attention_gpu
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.cases import ATTENTION_CASES
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    GROUP,
    MASS_BLOCKS,
    AttentionConfig,
)
from pallas_kernels.paged_attention.gpu_mass import pack, unpack
from pallas_kernels.select_tokens import gpu as select_gpu
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.select_tokens.cases import SELECT_CASES

# Cases that add little to the others and take the longest.
SLOW = {"prefill_first", "verify_g5", "verify_long"}
# Attention cases with a lane for every planted fault.
FAULTY = {"page_edges", "verify_edges", "step_d64"}

# The matrix unit reads 16-bit keys and values, so float32 cases run as bfloat16.
ATTENTION = tuple(
    dataclasses.replace(case, dtype="bfloat16")
    for case in tagged(ATTENTION_CASES, "small")
)
SELECT = tagged(SELECT_CASES, "small")
GATHER = tagged(GATHER_CASES, "small")


def case_params(cases, with_races):
    """Returns (case, interpreter) pairs: the named cases with race detection."""
    assert set(with_races) <= {case.name for case in cases}
    params = []
    for case in cases:
        mode = RACES if case.name in with_races else PLAIN
        marks = [pytest.mark.slow] if case.name in SLOW else []
        params.append(pytest.param(case, mode, marks=marks, id=case.name))
    return pytest.mark.parametrize("case, interpret", params)


def plant(faults, inputs, lanes):
    """Returns inputs with one fault in each of these lanes, the others untouched."""
    for fault, lane in zip(faults, lanes, strict=True):
        inputs = fault(inputs, lane)
    return inputs


def differs(check, actual, expected):
    """Returns whether the check refuses `actual`."""
    try:
        check(actual, expected)
    except AssertionError:
        return True
    return False


# ------------------------------------------------------------------ attention


def attention_setup(case, interpret, config=None):
    """Returns the compiled kernel, its check, inputs and the expected result."""
    inputs, expected = ki.attention_and_reference(case)
    kernel = functools.partial(
        attention_gpu.paged_attention_gpu,
        **case.options,
        interpret=interpret,
        config=config,
    )
    run = compile_interpreted(kernel, inputs)
    return run, assert_attention_close, inputs, expected


def assert_attention_close(actual, expected):
    """Raises AssertionError unless outputs agree, and masses to a thousandth."""
    ki.assert_attention_close(actual, expected, "bfloat16")
    if expected.mass is not None:
        error = jnp.linalg.norm(actual.mass - expected.mass)
        assert error <= 1e-3 * jnp.linalg.norm(expected.mass)


@case_params(ATTENTION, with_races=("page_edges", "verify_ragged", "step_bf16"))
def test_attention_equals_the_reference_and_shows_faults(case, interpret):
    run, check, inputs, expected = attention_setup(case, interpret)
    actual = run(inputs)
    check(actual, expected)
    if interpret is RACES:
        jax.tree.map(ki.assert_same_bits, actual, run(inputs))
    if case.name in FAULTY:
        lanes = np.flatnonzero(inputs.kv_lengths.max(1))
        faulty = run(plant(ki.ATTENTION_FAULTS, inputs, lanes))
        for lane, (token, num_queries) in enumerate(ki.lane_rows(case)):
            rows = slice(token, token + num_queries)
            got, wanted = (
                ki.AttentionOutput(x.out[rows], None) for x in (faulty, expected)
            )
            assert differs(check, got, wanted) == (lane in lanes), lane


# A prompt chunk of 40 queries and 4 heads is 160 rows: three tiles of 64 rows.
WIDE = dataclasses.replace(
    by_name(ATTENTION, "step"),
    name="wide",
    groups=((1, 1), (1, 40)),
    kv_lengths=(17, 75),
    q_lengths=(1, 39),
    head_step=0,
)
CONFIGS = {
    "many_ctas": ("step_bf16", dict(num_ctas=40)),
    "one_cta": ("step_bf16", dict(num_ctas=1)),
    "stages": ("verify_long", dict(num_ctas=2, num_stages=3, copy_rows=64)),
    "small_copies": ("verify_edges", dict(num_ctas=5, copy_rows=8)),
    "fine_mass": ("verify_ragged", dict(num_ctas=3, mass_bits=16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_does_not_depend_on_its_configuration(name):
    case_name, options = CONFIGS[name]
    case, config = by_name(ATTENTION, case_name), AttentionConfig(**options)
    run, check, inputs, expected = attention_setup(case, PLAIN, config)
    check(run(inputs), expected)


def test_attention_of_heads_without_keys():
    case = by_name(ATTENTION, "step_bf16")
    run, check, inputs, _ = attention_setup(case, PLAIN)
    lengths = inputs.kv_lengths.copy()
    lengths[0, 1], lengths[1, 0], lengths[2, 1] = 0, 0, 5  # of 9 queries
    inputs = inputs._replace(kv_lengths=lengths)
    options = case.options
    check(run(inputs), paged_attention(*inputs, **options, impl="reference"))


@pytest.mark.parametrize("name", ["verify_edges", "verify_ragged"])
def test_masses_of_several_calls_share_a_buffer(name):
    case = by_name(ATTENTION, name)
    unit = -(-BLOCK * MASS_BLOCKS // case.page_size)  # pages written together
    width = -(-case.table_width // unit) * unit
    case = dataclasses.replace(
        case, extra_columns=case.extra_columns + width - case.table_width
    )
    inputs, expected = ki.attention_and_reference(case)
    buffer = jnp.full((3, *expected.mass.shape), 7.0)
    for place in (2, 0):
        out, buffer = attention_gpu.paged_attention_gpu(
            *map(jnp.asarray, inputs), buffer, place, **case.options, interpret=PLAIN
        )
        for mass in (buffer[place], buffer[2]):
            assert_attention_close(expected._replace(out=out, mass=mass), expected)
    np.testing.assert_array_equal(buffer[1], 7.0)


def test_a_buffer_of_masses_has_whole_steps_of_keys():
    case = by_name(ATTENTION, "verify_edges")
    inputs, options = ki.attention_inputs(case), case.options
    mass = paged_attention(*inputs, **options, impl="reference").mass
    assert mass.shape[-1] % (BLOCK * MASS_BLOCKS)
    with pytest.raises(NotImplementedError, match="multiples of 1024"):
        paged_attention(
            *map(jnp.asarray, inputs),
            **options,
            mass_buffer=mass[None],
            impl="gpu_interpret",
        )


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_packed_probabilities_come_back(bits):
    levels = np.random.default_rng(bits).integers(0, 2**bits, (4, BLOCK))
    levels[:, 0], levels[:, -1] = 2**bits - 1, 0
    words = pack(jnp.asarray(levels, jnp.float32) + 0.25, bits)
    assert len(words) * 32 == bits * GROUP
    assert all(word.shape == (4, GROUP) for word in words)
    groups = unpack(words, bits)
    np.testing.assert_array_equal(np.concatenate(groups, axis=1), levels)


@pytest.mark.parametrize("rows", ["all", "edges"])
def test_attention_of_a_long_prompt_chunk(rows):
    case = dataclasses.replace(WIDE, mass_group=1, mass_rows=rows, num_heads=1)
    run, check, inputs, expected = attention_setup(case, PLAIN)
    check(run(inputs), expected)


def test_every_tuned_attention_entry_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(
        attention_gpu, "Spec", lambda **spec: used.append(spec) or 1 / 0
    )
    for case in ATTENTION:
        inputs = tuple(map(jnp.asarray, ki.attention_inputs(case)))
        with pytest.raises(ZeroDivisionError):
            attention_gpu.paged_attention_gpu(*inputs, **case.options)
    assert all(s["config"] is attention_gpu.TUNED[s["head_size"]] for s in used)
    assert {spec["head_size"] for spec in used} == set(attention_gpu.TUNED)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype="float32"), "bfloat16 only"),
        (dict(head_size=32), "head size is 32"),
        (dict(page_size=12), "page_size is 12"),
        (dict(group_size=33), "33 query heads"),
    ],
)
def test_attention_refuses_what_it_cannot_serve(change, message):
    case = dataclasses.replace(by_name(ATTENTION, "one_key"), **change)
    inputs, options = ki.attention_inputs(case), case.options
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(*map(jnp.asarray, inputs), **options, impl="gpu_interpret")


# ------------------------------------------------------------------ selection


def select_setup(case, interpret, config=None):
    """Returns the compiled kernel, inputs and the expected result."""
    inputs, expected = ki.select_and_reference(case)
    kernel = functools.partial(
        select_gpu.select_tokens_gpu, **case.options, interpret=interpret, config=config
    )
    return compile_interpreted(kernel, inputs), inputs, expected


@case_params(SELECT, with_races=("few", "recent", "layer"))
def test_selection_equals_the_reference_and_shows_faults(case, interpret):
    run, inputs, expected = select_setup(case, interpret)
    ki.assert_same_selection(run(inputs), expected)
    if interpret is RACES:
        # The sum over the heads does not change when two are swapped.
        unseen = {ki.swap_score_heads} if case.per_layer else set()
        faults = [fault for fault in ki.SELECT_FAULTS if fault not in unseen]
        # The first lane as often as there are lanes, each with a fault of its own.
        same = jax.tree.map(lambda x: np.repeat(x[:1], len(x), axis=0), inputs)
        faulty = run(plant(faults, same, range(len(faults))))
        wanted = jax.tree.map(lambda x: x[:1], expected)
        for lane in range(len(case.lengths)):
            got = jax.tree.map(lambda x, lane=lane: x[lane : lane + 1], faulty)
            seen = differs(ki.assert_same_selection, got, wanted)
            assert seen == (lane < len(faults)), lane


@pytest.mark.parametrize("sizes", [(2, 4, 4), (1, 8, 4), (1, 4, 8)], ids=str)
@pytest.mark.parametrize("lengths", [(2048, 1999), (1300, 900), (512, 3)], ids=str)
def test_selection_of_rows_longer_than_the_registers(sizes, lengths):
    """2048 candidates; the first 1024 or 512 are kept, the others read again."""
    names = "num_warpgroups", "per_thread", "again"
    config = select_gpu.SelectConfig(**dict(zip(names, sizes, strict=True)))
    heads = 2 if max(lengths) == 2048 else 1  # reading again finds them once
    case = dataclasses.replace(
        by_name(SELECT, "select_2k"), lengths=lengths, num_heads=heads
    )
    assert config.slab < case.num_candidates
    run, inputs, expected = select_setup(case, RACES, config)
    ki.assert_same_selection(run(inputs), expected)


def test_selection_of_rows_wider_than_32768():
    """As tuned: lanes whose candidates fill all pieces, one piece and none."""
    case = dataclasses.replace(
        by_name(SELECT, "select_2k"),
        num_candidates=36864,
        cap=2048,
        num_heads=1,
        lengths=(36864, 33000, 100),
        budgets=(1800, 500, 64),
    )
    run, inputs, expected = select_setup(case, True)
    ki.assert_same_selection(run(inputs), expected)


def test_every_tuned_selection_entry_is_used():
    sizes = [case.num_candidates for case in SELECT_CASES]
    used = {select_gpu.choose_config(size) for size in sizes}
    assert used >= set(select_gpu.TUNED.values())
    for size, config in select_gpu.TUNED.items():
        assert config.slab == size
        assert select_gpu.choose_config(size) is config


def test_selection_of_a_multiple_of_2048_needs_no_padding():
    for size in range(2048, 32768 + 1, 2048):
        assert select_gpu.choose_config(size).slab == size
    for size in range(32768, 131072 + 1, 4096):
        config = select_gpu.choose_config(size)
        assert config.slab + config.pieces(size) * config.piece == size
    case = dataclasses.replace(
        by_name(SELECT, "select_2k"),
        num_candidates=6144,
        lengths=(6144, 1999),
        num_heads=1,
    )
    run, inputs, expected = select_setup(case, True)
    ki.assert_same_selection(run(inputs), expected)


# --------------------------------------------------------------------- gather


@case_params(GATHER, with_races=("few_rows", "few_rows_bf16", "page_64"))
def test_gather_equals_the_reference_and_shows_faults(case, interpret):
    inputs = ki.gather_inputs(case)
    expected = gather_kv(*inputs, impl="reference")

    def kernel(pool, source, target, indices, counts):
        lists = indices[None], counts[None]
        (got,) = gather_gpu.gather_kv_gpu(
            (pool,), source, target, *lists, interpret=interpret
        )
        return got

    run = compile_interpreted(kernel, inputs)
    ki.assert_same_bits(run(inputs), expected)
    for faults in (ki.GATHER_FAULTS[:2], ki.GATHER_FAULTS[2:]):
        faulty = run(plant(faults, inputs, range(2)))
        for pages in inputs.target_table[:2]:
            pages = pages[(0 <= pages) & (pages < len(expected))]
            assert differs(ki.assert_same_bits, faulty[pages], expected[pages])


def test_gather_drops_rows_for_no_page():
    case = by_name(GATHER, "page_64")
    inputs = ki.gather_inputs(case)
    target = inputs.target_table.copy()
    target[0, 0], target[1, 0] = -1, len(inputs.kv_pages)
    inputs = inputs._replace(target_table=target)
    expected = gather_kv(*inputs, impl="reference")
    actual = gather_kv(*map(jnp.asarray, inputs), impl="gpu_interpret")
    ki.assert_same_bits(actual, expected)


def _two_layers(case):
    """Arguments of `gather_kv_layers` with other rows and lists in each layer."""
    first, second = ki.gather_inputs(case, seed=0), ki.gather_inputs(case, seed=1)
    pools = first.kv_pages, second.kv_pages[::-1].copy()
    indices = np.stack([first.indices, first.indices[:, ::-1]])
    counts = np.stack([first.counts, first.counts[:, ::-1]])
    return pools, first.source_table, first.target_table, indices, counts


def test_gather_in_several_layers_equals_one_after_the_other():
    inputs = jax.tree.map(jnp.asarray, _two_layers(by_name(GATHER, "page_64")))
    expected = gather_kv_layers(*inputs, impl="reference")
    actual = gather_kv_layers(*inputs, impl="gpu_interpret")
    for layer in range(2):
        ki.assert_same_bits(actual[layer], expected[layer])
    with pytest.raises(AssertionError):
        ki.assert_same_bits(actual[0], expected[1])


def test_gather_refuses_small_pages():
    inputs = ki.gather_inputs(
        dataclasses.replace(by_name(GATHER, "few_rows"), page_size=4)
    )
    with pytest.raises(NotImplementedError, match="page_size is 4"):
        gather_kv(*map(jnp.asarray, inputs), impl="gpu_interpret")


# ------------------------------------------------------------------ the device


@pytest.mark.gpu
@ki.each_case(ATTENTION)
def test_attention_on_the_device(case):
    inputs, expected = ki.attention_and_reference(case)
    actual = paged_attention(*map(jnp.asarray, inputs), **case.options, impl="gpu")
    assert_attention_close(actual, expected)


@pytest.mark.gpu
@ki.each_case(SELECT_CASES)
def test_selection_on_the_device(case):
    inputs, expected = ki.select_and_reference(case)
    actual = select_tokens(*map(jnp.asarray, inputs), **case.options, impl="gpu")
    ki.assert_same_selection(actual, expected)


@pytest.mark.gpu
@ki.each_case(GATHER)
def test_gather_on_the_device(case):
    inputs = tuple(map(jnp.asarray, ki.gather_inputs(case)))
    expected = gather_kv(*inputs, impl="reference")
    ki.assert_same_bits(gather_kv(*inputs, impl="gpu"), expected)
    inputs = jax.tree.map(jnp.asarray, _two_layers(case))
    expected = gather_kv_layers(*inputs, impl="reference")
    actual = gather_kv_layers(*inputs, impl="gpu")
    for layer in range(2):
        ki.assert_same_bits(actual[layer], expected[layer])
