"""Selection by an index of keys: codes, parity with the reference, planted faults.

Pages that no lane reads hold codes of NaN, tables name no page past a length, and
needles (keys along their queries, at the edges of pages and lengths) must be picked.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest
from gpu_interpreter import PLAIN, RACES, compile_interpreted

from pallas_kernels import timing
from pallas_kernels.cases import by_name, tagged
from pallas_kernels.code_keys import bench as code_bench
from pallas_kernels.code_keys import code_keys
from pallas_kernels.code_keys.cases import CODE_CASES
from pallas_kernels.code_keys.gpu import code_keys_gpu
from pallas_kernels.score_select import bench as score_bench
from pallas_kernels.score_select import code_layout, encode, score_select
from pallas_kernels.score_select.cases import SCORE_CASES
from pallas_kernels.score_select.codes import decode
from pallas_kernels.score_select.gpu import ScoreConfig, score_select_gpu
from pallas_kernels.score_select.reference import index_scores, ranks_of

SCORE = tagged(SCORE_CASES, "small")
CODE = tagged(CODE_CASES, "small")
_NAN = np.int32(0x7FC07FC0)  # a range of NaN, and words like any other


class ScoreInputs(NamedTuple):
    """Array arguments of `score_select`."""

    q: np.ndarray
    codes: np.ndarray
    page_table: np.ndarray
    lengths: np.ndarray
    budgets: np.ndarray


def scattered_table(rng, lengths, page_size, width):
    """A table of pages in no order, and ids of no page past the lengths."""
    counts = [-(-n // page_size) for n in lengths]
    pages = iter(1 + rng.permutation(sum(counts)))
    table = rng.choice([-1, 1 << 20], (len(lengths), width)).astype(np.int32)
    for lane, count in enumerate(counts):
        table[lane, :count] = [next(pages) for _ in range(count)]
    return table, 1 + sum(counts)


def needles(length, page_size):
    """Positions at the edges of a text and of its pages."""
    inside = {0, length - 1, page_size - 1, page_size, length // page_size * page_size}
    return sorted(n for n in inside if 0 <= n < length)


def score_inputs(case, seed=0):
    """Inputs of a case."""
    rng = np.random.default_rng(seed)
    layout, size, lengths = case.layout, case.head_size, case.lengths
    table, num_pages = scattered_table(rng, lengths, case.page_size, case.width)
    codes = np.full(layout.shape(num_pages, case.num_heads), _NAN)
    q = np.empty((len(lengths), case.num_heads, case.group_size, size), np.float32)
    for lane, head in np.ndindex(len(lengths), case.num_heads):
        length = lengths[lane]
        along = rng.normal(size=size) * np.exp(rng.normal(size=size))
        q[lane, head] = along + 0.2 * rng.normal(size=(case.group_size, size))
        if not length:
            continue
        groups = -(-length // layout.group)
        keys = np.full((groups * layout.group, size), np.nan, np.float32)
        keys[:length] = rng.normal(size=(length, size))
        for position in needles(length, case.page_size):
            keys[position] = 3 * np.sign(along)
        keys = keys.reshape(groups, layout.group, size)
        used = np.arange(groups * layout.group).reshape(keys.shape[:2]) < length
        rows = np.asarray(encode(jnp.asarray(keys), jnp.asarray(used), layout))
        for i, row in enumerate(rows):
            page = table[lane, i // layout.groups]
            codes[page, head, i % layout.groups] = row
    q = jnp.asarray(q.reshape(len(lengths), -1, size), case.dtype)
    lengths, budgets = (np.asarray(x, np.int32) for x in (lengths, case.budgets))
    return ScoreInputs(np.asarray(q), codes, table, lengths, budgets)


def ranks_by_reference(case, inputs):
    """Ranks of all keys, numpy [lanes, H, X]."""
    *args, _ = jax.tree.map(jnp.asarray, tuple(inputs))
    scale = case.head_size**-0.5
    return np.asarray(ranks_of(index_scores(*args, layout=case.layout, scale=scale)))


def assert_picks(case, got, ranks):
    """Raises AssertionError unless `got` are the best keys, but for one rank."""
    for lane, length in enumerate(case.lengths):
        count = min(case.budgets[lane], length, case.cap)
        recent = np.arange(length - min(case.num_recent, count), length)
        for head in range(case.num_heads):
            assert got.counts[lane, head] == count
            picks = np.asarray(got.indices[lane, head, :count])
            assert (np.diff(picks) > 0).all() and np.isin(recent, picks).all()
            if not count:
                continue
            assert 0 <= picks[0] and picks[-1] < length
            row = ranks[lane, head, :length]
            assert np.isfinite(row).all()
            chosen = np.setdiff1d(picks, recent)
            left = np.setdiff1d(np.arange(length), picks)
            if len(chosen) and len(left):
                assert row[chosen].min() >= row[left].max() - 1
            if count >= 9:  # room for all of them
                assert np.isin(needles(length, case.page_size), picks).all()


def lose_a_page(inputs):
    """The second page of the first lane is read where the first one should be."""
    table = inputs.page_table.copy()
    table[0, 0] = table[0, 1]
    return inputs._replace(page_table=table)


def shorten(inputs):
    """The last key of the first lane is not seen."""
    lengths = inputs.lengths.copy()
    lengths[0] -= 1
    return inputs._replace(lengths=lengths)


def swap_heads(inputs):
    """Every head reads the codes of its neighbour."""
    return inputs._replace(codes=np.roll(inputs.codes, 1, axis=1))


def swap_words(case):
    """A fault of codes whose words lie one place further."""
    size = case.head_size

    def swap(inputs):
        codes = inputs.codes.copy()
        codes[..., size:] = np.roll(codes[..., size:], 1, axis=-1)
        return inputs._replace(codes=codes)

    return swap


@pytest.mark.parametrize("case", SCORE, ids=lambda case: case.name)
def test_picks_are_those_of_the_reference_and_faults_show(case):
    inputs = score_inputs(case)
    ranks = ranks_by_reference(case, inputs)
    expected = score_select(*inputs, **case.options, impl="reference")
    assert_picks(case, expected, ranks)
    kernel = functools.partial(
        score_select_gpu,
        **case.options,
        scale=case.head_size**-0.5,
        interpret=RACES if case.name == "score_pages_16" else PLAIN,
        config=ScoreConfig(num_warpgroups=2 if case.bits == 4 else 1, at_once=1),
    )
    run = compile_interpreted(kernel, inputs)
    assert_picks(case, run(inputs), ranks)
    if case.name != "score_g7":
        return
    for fault in (lose_a_page, shorten, swap_heads, swap_words(case)):
        with pytest.raises(AssertionError):
            assert_picks(case, run(fault(inputs)), ranks)


def test_picks_on_a_tpu_are_those_of_the_reference():
    case = by_name(SCORE_CASES, "score_pages_16")
    inputs = score_inputs(case)
    got = score_select(*inputs, **case.options, impl="tpu_interpret")
    assert_picks(case, got, ranks_by_reference(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCORE, ids=lambda case: case.name)
def test_picks_on_a_device_are_those_of_the_reference(case):
    inputs = score_inputs(case)
    ranks = ranks_by_reference(case, inputs)
    for config in (None, ScoreConfig(num_warpgroups=2), ScoreConfig(at_once=4)):
        select = functools.partial(
            score_select_gpu,
            **case.options,
            scale=case.head_size**-0.5,
            config=config,
        )
        args = jax.tree.map(jnp.asarray, tuple(inputs))
        assert_picks(case, jax.jit(select)(*args), ranks)


# ------------------------------------------------------------------ codes


@pytest.mark.parametrize(("bits", "page_size"), [(4, 64), (4, 16), (2, 256), (8, 12)])
def test_codes_are_the_nearest_levels_of_the_keys_in_use(bits, page_size):
    layout = code_layout(page_size, 8, bits, 64)
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(3, layout.group, 8)).astype(np.float32)
    used = np.arange(layout.group) < np.array([[layout.group], [3], [0]])
    keys[~used] = np.nan
    rows = encode(jnp.asarray(keys), jnp.asarray(used), layout)
    assert rows.shape == (3, layout.row)
    assert (np.asarray(rows[2]) == 0).all()
    got = np.asarray(decode(rows, layout).astype(jnp.float32))
    for i in range(2):
        span = keys[i][used[i]].max(0) - keys[i][used[i]].min(0)
        # Half a step, and the roundings of the base and of the result.
        bound = 0.51 * span / (2**bits - 1) + 2**-7 * (np.abs(keys[i][used[i]]).max(0))
        assert (np.abs(got[i] - keys[i])[used[i]] <= bound + span * 2**-6).all()


def test_neighbouring_keys_lie_in_neighbouring_words():
    layout = code_layout(64, 4, 4, 128)
    keys = jnp.arange(64.0)[:, None] % 16 * jnp.ones((1, 4))
    row = np.asarray(encode(keys, jnp.ones(64, bool), layout)).view(np.uint32)
    words = row[4:].reshape(4, 8)
    # Word w has key 8 f + w in field f; of these keys the last bits are those of w.
    for w in range(8):
        levels = [int(words[0, w] >> 4 * f) & 15 for f in range(8)]
        assert levels == [(8 * f + w) % 16 for f in range(8)]


def code_inputs(case, seed=0):
    """(codes, pool, table, starts, ends): NaN behind the ends and in other pages."""
    rng = np.random.default_rng(seed)
    table, num_pages = scattered_table(rng, case.ends, case.page_size, case.width)
    shape = (num_pages, case.num_heads, case.page_size, 2 * case.head_size)
    pool = rng.normal(size=shape)
    pool[0] = np.nan
    for lane, end in enumerate(case.ends):
        column, used = divmod(end, case.page_size)
        if used:
            pool[table[lane, column], :, used:] = np.nan
    codes = np.full(case.layout.shape(num_pages, case.num_heads), _NAN)
    pool = np.asarray(jnp.asarray(pool, case.dtype))
    starts, ends = (np.asarray(x, np.int32) for x in (case.starts, case.ends))
    return codes, pool, table, starts, ends


@pytest.mark.parametrize("case", CODE, ids=lambda case: case.name)
def test_keys_are_coded_up_to_their_lengths_and_faults_show(case):
    inputs = code_inputs(case)
    expected = np.asarray(code_keys(*inputs, **case.options, impl="reference"))
    layout, (codes, pool, table, *_) = case.layout, inputs
    is_coded = np.zeros(codes.shape[:3], bool)
    for lane, (start, end) in enumerate(zip(case.starts, case.ends, strict=True)):
        groups = range(start // layout.group, -(-end // layout.group) * (start < end))
        for group in groups:
            page, part = table[lane, group // layout.groups], group % layout.groups
            is_coded[page, :, part] = True
            count = min(end - group * layout.group, layout.group)
            first = part * layout.group
            keys = pool[page, :, first : first + count, : case.head_size]
            alone = encode(
                jnp.pad(jnp.asarray(keys), ((0, 0), (0, layout.group - count), (0, 0))),
                jnp.broadcast_to(jnp.arange(layout.group) < count, (2, layout.group)),
                layout,
            )
            ki.assert_same_bits(expected[page, :, part], np.asarray(alone))
    assert (expected[~is_coded] == codes[~is_coded]).all()
    options = dict(layout=layout, most=1 + -(-(case.most_keys - 1) // layout.group))
    kernel = functools.partial(code_keys_gpu, **options, interpret=PLAIN)
    run = compile_interpreted(kernel, inputs)
    ki.assert_same_bits(np.asarray(run(inputs)), expected)
    ends = inputs[4] - 1  # a key is forgotten
    assert (np.asarray(run((*inputs[:4], ends))) != expected).any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CODE, ids=lambda case: case.name)
def test_keys_are_coded_alike_on_a_device(case):
    inputs = code_inputs(case)
    args = jax.tree.map(jnp.asarray, inputs)
    got, expected = (
        jax.jit(functools.partial(code_keys, **case.options, impl=impl))(*args)
        for impl in ("gpu", "reference")
    )
    assert (got == expected).mean() > 0.999  # a level where a key lies half way


# ------------------------------------------------------------------ limits


def test_what_cannot_be_served_is_said_before_work():
    case = by_name(SCORE_CASES, "score_small")
    inputs = score_inputs(case)
    select = functools.partial(score_select, **case.options)
    refused = [
        (dict(q=inputs.q[:2]), "give each a query", ValueError),
        (dict(codes=inputs.codes[..., 1:]), "words of a group", ValueError),
        (dict(q=np.asarray(inputs.q, np.float32)), "bfloat16", NotImplementedError),
        (dict(page_table=np.zeros((4, 4096), np.int32)), "room", NotImplementedError),
    ]
    for change, message, error in refused:
        with pytest.raises(error, match=message):
            select(*inputs._replace(**change), impl="gpu")
    with pytest.raises(ValueError, match="scale is -1"):
        select(*inputs, scale=-1.0, impl="gpu")
    layouts = dict(layout=dataclasses.replace(case.layout, head_size=32))
    with pytest.raises(NotImplementedError, match="head size is 32"):
        code_keys(
            np.zeros(layouts["layout"].shape(2, 1), np.int32),
            np.zeros((2, 1, 64, 64), np.float32),
            *[np.zeros((1, 1), np.int32)],
            *[np.zeros(1, np.int32)] * 2,
            most_keys=1,
            impl="gpu",
            **layouts,
        )


@pytest.mark.parametrize(
    ("bench", "case"), [(score_bench, SCORE[0]), (code_bench, CODE[0])]
)
def test_the_benchmarks_compare_with_the_reference(monkeypatch, bench, case):
    for name, value in (("MIN_PROGRAMS", 1), ("REPEATS", 1), ("SECONDS", 0.0)):
        monkeypatch.setattr(timing, name, value)
    rates = timing.Rates(read=1e12, copy=1e12)
    result = bench.bench(case, impl="reference", rates=rates, num_layers=2)
    assert result["us"] > 0
    if bench is score_bench:
        assert result["same_picks"] == 1 and result["worst_miss"] <= 0
        # Two lanes of 300 and 64 keys: 16 channels, ranges of 5 and 1 groups, lists.
        words = (5 + 1 + 1) * 16 * (1 + 8) + (5 + 1 + 1) * 128 + 40 + 40 + 1
        assert result["bytes"] == 2 * 4 * words
    else:
        assert result["same_words"] == 1
