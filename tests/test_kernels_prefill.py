"""Attention of prompt chunks, a GPU launch of its own, in the interpreter."""

import contextlib
import dataclasses
import functools

import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import PLAIN, RACES, compile_interpreted

from pallas_kernels.cases import by_name, tagged
from pallas_kernels.paged_attention import LaneGroup, paged_attention
from pallas_kernels.paged_attention.cases import ATTENTION_CASES
from pallas_kernels.paged_attention.gpu import (
    TUNED_PREFILL,
    _split_groups,
    paged_attention_gpu,
)
from pallas_kernels.paged_attention.gpu_chunk import PrefillConfig, lane_order

CHUNKS = tagged(ATTENTION_CASES, "chunk")
# Lane groups of these tests that are chunks.
SMALL_CHUNK = dict(min_queries=10, min_ctas=1)
THREE = dict(
    num_consumers=3,
    takes_turns=False,
    block_keys=64,
    num_stages=3,
    registers=160,
    copy_registers=32,
)
CONFIGS = {
    "two": {},
    "one": dict(num_consumers=1, takes_turns=False),
    "three": THREE,
    "no_turns": dict(takes_turns=False, overlaps=False),
}
SLOW = {("chunk_g8", "two"), ("prefill_first", "one"), ("step", "two")}


def chunk_case(name):
    """Returns a case as its chunks see it: bfloat16, no mass of the last group."""
    case = by_name(ATTENTION_CASES, name)
    last = len(case.groups) - 1
    mass_group = None if case.mass_group == last else case.mass_group
    return dataclasses.replace(case, dtype="bfloat16", mass_group=mass_group)


def compiled_chunks(case, interpret=PLAIN, **config):
    """Returns the interpreted kernel, compiled; it raises after a race."""
    kernel = functools.partial(
        paged_attention_gpu,
        **case.options,
        interpret=interpret,
        prefill=PrefillConfig(**SMALL_CHUNK, **config),
    )
    inputs = ki.attention_inputs(case)
    return compile_interpreted(kernel, inputs, optimization_level=3)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair in SLOW else [])
        for pair in [
            ("chunk_ragged", "two"),
            ("chunk_edges", "three"),
            ("chunk_d64", "two"),
            ("chunk_g5", "no_turns"),
            ("chunk_g8", "two"),
            ("step", "two"),
            ("prefill_first", "one"),
        ]
    ],
    ids=str,
)
def test_chunks_equal_the_reference(name, config):
    case = chunk_case(name)
    inputs, expected = ki.attention_and_reference(case)
    interpret = RACES if name in ("chunk_edges", "step") else PLAIN
    run = compiled_chunks(case, interpret, **CONFIGS[config])
    ki.assert_attention_close(run(inputs), expected, "bfloat16")


@pytest.fixture(scope="module")
def ragged():
    """The ragged case, its kernel, inputs and result."""
    case = chunk_case("chunk_ragged")
    run, inputs = compiled_chunks(case), ki.attention_inputs(case)
    return case, run, inputs, run(inputs)


def test_chunks_show_faults(ragged):
    """Several at once, each in a lane of its own: a run takes seconds."""
    case, run, inputs, result = ragged
    expected = paged_attention(*inputs, **case.options, impl="reference")
    ki.assert_attention_close(result, expected, "bfloat16")
    lose_page, shorten_by_one, swap_heads, stale_tail = ki.ATTENTION_FAULTS
    rows = ki.lane_rows(case)
    for faults in (
        {2: lose_page, 3: shorten_by_one, 5: swap_heads},
        {3: stale_tail},
    ):
        faulty = inputs
        for lane, fault in faults.items():
            faulty = fault(faulty, lane)
        out = np.asarray(run(faulty).out)
        for lane, (token, num_queries) in enumerate(rows):
            found, wanted = (
                expected._replace(out=x[token : token + num_queries], mass=None)
                for x in (out, np.asarray(expected.out))
            )
            is_seen = pytest.raises(AssertionError)
            with is_seen if lane in faults else contextlib.nullcontext():
                ki.assert_attention_close(found, wanted, "bfloat16")


def test_chunks_do_not_depend_on_padding_neighbours_or_length(ragged):
    """Bit for bit: NaN in padding, another neighbour, and a chunk cut in two."""
    case, run, inputs, result = ragged
    rows = ki.lane_rows(case)
    token, num_queries = rows[3]
    q, kv_lengths, q_lengths = inputs.q.copy(), inputs.kv_lengths, inputs.q_lengths
    q[token + q_lengths[3] : token + num_queries] = np.nan
    kv_lengths, q_lengths = kv_lengths.copy(), q_lengths.copy()
    kv_lengths[5], q_lengths[5] = 0, 0
    ended = 13  # the last queries come with the next chunk
    kept = q_lengths[3] - ended
    kv_lengths[3] -= ended
    q_lengths[3] = kept
    changed = inputs._replace(q=q, kv_lengths=kv_lengths, q_lengths=q_lengths)
    actual = run(changed)
    ki.assert_same_bits(
        actual.out[token : token + kept], result.out[token : token + kept]
    )
    first, _ = rows[2]
    ki.assert_same_bits(actual.out[first : first + 40], result.out[first : first + 40])
    assert not np.asarray(actual.out[token + kept : token + num_queries]).any()
    assert np.asarray(result.out[token + kept : token + kept + ended]).any()


def test_only_last_groups_of_many_queries_are_chunks():
    groups = ((64, 1), (4, 512), (8, 9), (2, 100), (4, 512))

    def is_chunk(group):
        group = LaneGroup(*group)
        return TUNED_PREFILL[128].serves(group, num_heads=8, group_size=4)

    assert _split_groups(groups, None, is_chunk) == (groups[:3], groups[3:])
    assert _split_groups(groups, 4, is_chunk) == (groups, ())
    assert _split_groups(groups, 3, is_chunk) == (groups[:4], groups[4:])
    assert _split_groups(groups[-1:], None, is_chunk) == ((), groups[-1:])
    assert _split_groups(groups[:1], None, is_chunk) == (groups[:1], ())
    # Few CTAs would leave most of the device idle.
    assert is_chunk((1, 256)) and not is_chunk((1, 128)) and is_chunk((2, 128))
    assert not is_chunk((64, 64))
    # With pieces the launch follows from the number of queries alone.
    assert is_chunk((1, 128, 512)) and not is_chunk((64, 64, 512))


def test_longest_lanes_come_first():
    kv_lengths = jnp.asarray([[5, 9], [12, 3], [9, 1], [90, 90], [0, 0]])
    order = lane_order(kv_lengths, jnp.asarray([1, 2, 3, 0, 0]))
    np.testing.assert_array_equal(order, [1, 0, 2, 3, 4])


@pytest.mark.parametrize(
    "change",
    [
        dict(num_stages=1),
        dict(min_queries=0),
        dict(num_consumers=4, takes_turns=False),
        dict(block_keys=32),
        dict(num_consumers=3),
    ],
    ids=str,
)
def test_prefill_options_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PrefillConfig(**change)


def test_flops_of_a_chunk_are_counted_exactly():
    case = chunk_case("chunk_ragged")
    lengths, queries = case.kv_length_array(), case.q_length_array()
    seen = sum(
        int(keys) - int(count) + i + 1
        for row, count in zip(lengths, queries, strict=True)
        for keys in row
        for i in range(count)
    )
    assert case.num_flops == seen * 4 * case.group_size * case.head_size


def test_chunks_refuse_a_scale_that_is_not_positive():
    case = chunk_case("chunk_g8")
    inputs = map(jnp.asarray, ki.attention_inputs(case))
    with pytest.raises(NotImplementedError, match="scale is -1.0"):
        paged_attention_gpu(
            *inputs,
            **case.options,
            scale=-1.0,
            prefill=PrefillConfig(**SMALL_CHUNK),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["two", "three", "no_turns"])
@pytest.mark.parametrize("name", [*(case.name for case in CHUNKS), "step"])
def test_chunks_on_the_device(name, config):
    case = chunk_case(name)
    inputs = tuple(map(jnp.asarray, ki.attention_inputs(case)))
    options = case.options
    expected = paged_attention(*inputs, **options, impl="reference")
    prefill = PrefillConfig(**SMALL_CHUNK, **CONFIGS[config])
    actual = paged_attention_gpu(*inputs, **options, prefill=prefill)
    ki.assert_attention_close(actual, expected, "bfloat16")
    again = paged_attention_gpu(*inputs, **options, prefill=prefill)
    ki.assert_same_bits(actual.out, again.out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["prefill_6k", "prefill_step", "prefill_d64"])
def test_large_chunks_on_the_device(name):
    case = by_name(ATTENTION_CASES, name)
    inputs = tuple(map(jnp.asarray, ki.attention_inputs(case)))
    options = dict(groups=case.options["groups"])
    expected = paged_attention(*inputs, **options, impl="reference")
    actual = paged_attention(*inputs, **options, impl="gpu")
    ki.assert_attention_close(actual, expected, "bfloat16")
