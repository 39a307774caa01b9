"""The references against numbers worked out by hand and against jax.nn."""

import functools
import math

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import numpy as np
import pytest

from pallas_kernels.cases import tagged
from pallas_kernels.common import default_impl, load_implementation
from pallas_kernels.gather_kv import gather_kv
from pallas_kernels.gather_kv.cases import GATHER_CASES
from pallas_kernels.paged_attention import LaneGroup, paged_attention
from pallas_kernels.paged_attention.cases import ATTENTION_CASES
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.select_tokens.cases import SELECT_CASES

NAN = float("nan")
attend = functools.partial(paged_attention, impl="reference")
select = functools.partial(select_tokens, impl="reference")
gather = functools.partial(gather_kv, impl="reference")

small_attention = ki.each_case(tagged(ATTENTION_CASES, "small"))
small_select = ki.each_case(tagged(SELECT_CASES, "small"))
small_gather = ki.each_case(
    tagged(GATHER_CASES, "small") + tagged(GATHER_CASES, "shared")
)


def pool_of(keys, values, page_size=2):
    """Returns one lane's pages [P, 1, page_size, 2] (D = 1) and its table [1, P]."""
    rows = np.stack([keys, values], axis=-1).astype(np.float32)
    pages = rows.reshape(-1, 1, page_size, 2)
    return jnp.asarray(pages), jnp.arange(len(pages), dtype=jnp.int32)[None]


def int32(*values):
    return jnp.asarray(values, jnp.int32)


# ------------------------------------------------------------------ attention


def attend_lane(q, keys_and_table, length, *, valid=None, **options):
    """Attention of one lane with `length` keys; of its rows, None: all are valid."""
    q_lengths = int32(len(q) if valid is None else valid)
    groups = (LaneGroup(1, len(q)),)
    args = (q, *keys_and_table, int32([length]), q_lengths)
    return attend(*args, groups=groups, **options)


def test_attention_of_one_query_by_hand():
    # Logits 0 and ln 3, weights 1/4 and 3/4: 4/4 + 8 * 3/4 = 7. Key 2 is not visible.
    keys = pool_of([0.0, math.log(3), NAN, NAN], [4.0, 8.0, NAN, NAN])
    got = attend_lane(jnp.ones((1, 1, 1)), keys, 2, scale=1.0)
    np.testing.assert_allclose(got.out, [[[7.0]]], rtol=1e-6)
    assert got.mass is None


@pytest.mark.parametrize("rows", ["all", "edges"])
def test_causal_tail_and_mass_by_hand(rows):
    # Keys exp to 1, 3, 4, 8, 16 at scale 1 with q = 1. Three queries, five keys:
    #   query 0 sees 1 3 4      -> (4 + 8*3 + 16*4) / 8 = 11.5
    #   query 1 sees 1 3 4 8    -> (4 + 24 + 64 + 0) / 16 = 5.75
    #   query 2 sees everything -> (4 + 24 + 64 + 0 + 32*16) / 32 = 18.875
    # Candidates are keys 0 and 1 (length 5 less 3 queries).
    #   key 0: 1/8, 1/16, 1/32;   key 1: three times that
    #   all: (4 + 2 + 1) / 32 / 3 = 7/96;   edges (rows 0 and 2): 5/64
    keys = [math.log(k) for k in (1, 3, 4, 8, 16)] + [NAN]
    keys = pool_of(keys, [4.0, 8.0, 16.0, 0.0, 32.0, NAN])
    options = dict(scale=1.0, mass_group=0, mass_rows=rows)
    got = attend_lane(jnp.ones((3, 1, 1)), keys, 5, **options)
    np.testing.assert_allclose(got.out[:, 0, 0], [11.5, 5.75, 18.875], rtol=1e-6)
    first = 7 / 96 if rows == "all" else 5 / 64
    expected = [first, 3 * first, 0, 0, 0, 0]
    np.testing.assert_allclose(got.mass[0, 0], expected, rtol=1e-6)


def test_mass_goes_to_its_place_of_a_buffer():
    keys = pool_of([0.0, np.log(3.0), 0.0, 0.0], [0.0] * 4)
    buffer = jnp.full((3, 1, 1, 4), 7.0)
    options = dict(mass_group=0, mass_buffer=buffer, mass_place=1)
    mass = attend_lane(jnp.ones((1, 1, 1)), keys, 3, **options).mass
    np.testing.assert_allclose(mass[1, 0, 0], [0.2, 0.6, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(mass[::2], buffer[::2])


def test_padding_rows_count_for_nothing():
    # Two of three query rows are valid: the rows of the test above, less the last.
    # The lane then has length 4, so candidates are again keys 0 and 1:
    #   key 0: (1/8 + 1/16) / 2 = 3/32;  key 1: 9/32
    keys = [math.log(k) for k in (1, 3, 4, 8)]
    keys = pool_of(keys, [4.0, 8.0, 16.0, 0.0])
    q = jnp.asarray([1.0, 1.0, NAN])[:, None, None]
    for rows in ("all", "edges"):
        options = dict(scale=1.0, mass_group=0, mass_rows=rows)
        got = attend_lane(q, keys, 4, valid=2, **options)
        np.testing.assert_allclose(got.out[:, 0, 0], [11.5, 5.75, 0.0], rtol=1e-6)
        np.testing.assert_allclose(got.mass[0, 0], [3 / 32, 9 / 32, 0, 0], rtol=1e-6)


def test_mass_averages_the_query_heads_of_a_kv_head():
    # q = 1 gives key 0 of three keys 1/8; q = 0 gives every key 1/3; their mean is
    # 11/48. One query, so keys 0 and 1 are candidates; key 1: (3/8 + 1/3) / 2 = 17/48.
    keys = [math.log(k) for k in (1, 3, 4)] + [NAN]
    keys = pool_of(keys, [0.0, 0.0, 0.0, NAN])
    options = dict(scale=1.0, mass_group=0, mass_rows="edges")
    got = attend_lane(jnp.asarray([[[1.0], [0.0]]]), keys, 3, **options)
    np.testing.assert_allclose(got.mass[0, 0], [11 / 48, 17 / 48, 0, 0], rtol=1e-6)


def test_tables_heads_and_groups_by_hand():
    # Page 3 then page 1, two KV heads. Equal logits: the mean of the values.
    #   head 0 sees 3 keys: (1 + 2 + 3) / 3 = 2;  head 1 sees 1 key: 10
    # The lane of the first group is idle and its table holds no page at all.
    pool = np.full((4, 2, 2, 2), NAN, np.float32)
    pool[3, 0] = [[0, 1], [0, 2]]
    pool[1, 0, 0] = [0, 3]
    pool[3, 1, 0] = [0, 10]
    got = attend(
        jnp.ones((2, 2, 1)),
        jnp.asarray(pool),
        int32([-1, 9], [3, 1]),
        int32([0, 0], [3, 1]),
        int32(0, 1),
        groups=(LaneGroup(1, 1), LaneGroup(1, 1)),
        mass_group=1,
    )
    np.testing.assert_allclose(got.out[:, :, 0], [[0, 0], [2, 10]], rtol=1e-6)
    np.testing.assert_allclose(
        got.mass[0], [[1 / 3, 1 / 3, 0, 0], [0, 0, 0, 0]], rtol=1e-6
    )


@small_attention
def test_attention_agrees_with_jax_nn(case):
    inputs = ki.attention_inputs(case)
    got = attend(*inputs, **case.options)
    size, members = case.head_size, (case.num_heads, case.group_size)
    key = np.arange(case.table_width * case.page_size)
    for lane, (token, num_rows) in enumerate(ki.lane_rows(case)):
        pages = np.maximum(inputs.page_table[lane], 0) % len(inputs.kv_pages)
        rows = inputs.kv_pages[pages].swapaxes(1, 2).astype(np.float32)
        rows = np.nan_to_num(rows.reshape(-1, case.num_heads, 2 * size))
        query = np.arange(num_rows)[:, None]
        valid = inputs.q_lengths[lane]
        last = inputs.kv_lengths[lane, :, None, None] - valid + query
        mask = (query < valid) & (key <= last)  # [H, rows, keys]
        expected = _jax_nn_attention(
            inputs.q[token : token + num_rows].astype(np.float32),
            rows[..., :size],
            rows[..., size:],
            np.repeat(mask, case.group_size, axis=0),
        )
        expected = np.where(
            mask.any(-1).T[:, :, None, None],
            expected.reshape(num_rows, *members, size),
            0.0,
        )
        actual = got.out[token : token + num_rows].astype(jnp.float32)
        bound = 1e-5 if case.dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            actual.reshape(expected.shape), expected, rtol=bound, atol=bound
        )


_jax_nn_attention = jax.jit(
    lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask)
)


@small_attention
def test_mass_and_tail_sum_to_one(case):
    if case.mass_group is None:
        pytest.skip("the case asks for no mass")
    inputs = ki.attention_inputs(case)
    lanes = [n for n, *_ in case.groups]
    first = sum(lanes[: case.mass_group])
    rows = ki.lane_rows(case)
    # With V = 1 on the rows of the tail and 0 elsewhere, out is the tail's share.
    kv_pages = np.array(inputs.kv_pages, np.float32)
    kv_pages[..., case.head_size :] = 0.0
    for lane, head in np.ndindex(inputs.kv_lengths.shape):
        length = inputs.kv_lengths[lane, head]
        for key in range(length - inputs.q_lengths[lane], length):
            page = inputs.page_table[lane, key // case.page_size]
            kv_pages[page, head, key % case.page_size, case.head_size :] = 1.0
    inputs = inputs._replace(kv_pages=kv_pages, q=np.array(inputs.q, np.float32))
    options = case.options
    got = attend(*inputs, **options)
    for lane in range(lanes[case.mass_group]):
        token, _ = rows[first + lane]
        valid = inputs.q_lengths[first + lane]
        if valid == 0:
            assert not np.asarray(got.mass[lane]).any()
            continue
        used = list(range(valid))
        if case.mass_rows == "edges":
            used = sorted({0, int(valid) - 1})
        share = np.asarray(got.out[token + np.asarray(used), :, 0])
        share = share.reshape(len(used), case.num_heads, -1).mean((0, 2))
        total = np.asarray(got.mass[lane]).sum(-1) + share
        np.testing.assert_allclose(total, 1.0, rtol=1e-5)


@small_attention
@pytest.mark.parametrize("fault", ki.ATTENTION_FAULTS, ids=lambda fault: fault.__name__)
def test_attention_comparison_sees_planted_faults(case, fault):
    inputs, options = ki.attention_inputs(case), case.options
    expected = attend(*inputs, **options)
    ki.assert_attention_close(expected, expected, case.dtype)
    for lane in np.flatnonzero(inputs.kv_lengths.max(1)):
        faulty = attend(*fault(inputs, lane), **options)
        # Even the wide bound of bfloat16 must not hide the fault of a single lane.
        with pytest.raises(AssertionError):
            ki.assert_attention_close(faulty, expected, "bfloat16")


@pytest.mark.usefixtures("no_type_checks")
def test_attention_rejects_what_does_not_fit():
    pool, table = pool_of([0.0, 0.0], [0.0, 0.0])
    good = dict(groups=(LaneGroup(1, 1),), impl="reference")

    def pieces(*groups):
        return good | dict(groups=groups)

    two_pieces = pieces(LaneGroup(1, 1, 64), LaneGroup(1, 1, 128))
    q, lengths, one = jnp.ones((1, 1, 1)), int32([1]), int32(1)
    for args, options, word in (
        ((jnp.ones((2, 1, 1)), pool, table, lengths, one), good, "q has shape"),
        ((q.astype(jnp.bfloat16), pool, table, lengths, one), good, "q has dtype"),
        ((q, pool, table, int32([1, 1]), one), good, "kv_lengths has shape"),
        ((q, pool, table[0], lengths, one), good, "page_table has shape"),
        ((q, pool, table * 1.0, lengths, one), good, "page_table has dtype"),
        ((q, pool[..., :1], table, lengths, one), good, "kv_pages has shape"),
        ((q, pool, table, lengths, one), good | dict(groups=()), "groups is"),
        ((q, pool, table, lengths, one), pieces(LaneGroup(1, 1, 96)), "multiple of 64"),
        ((q, pool, table, lengths, one), pieces(LaneGroup(1, 1, 0)), "multiple of 64"),
        ((q, pool, table, lengths, one), two_pieces, "the same number of keys"),
        ((q, pool, table, lengths, one), good | dict(mass_group=1), "mass_group is 1"),
        ((q, pool, table, lengths, one), good | dict(mass_rows="no"), "mass_rows is"),
        ((q, pool, table, lengths, one), good | dict(impl="triton"), "impl is"),
    ):
        with pytest.raises(ValueError, match=word):
            paged_attention(*args, **options)
    mass = dict(mass_group=0, mass_buffer=jnp.zeros((2, 1, 1, 2)))
    for change, word in (
        (dict(mass_group=None), "mass_group is None"),
        (dict(mass_place=2), "mass_place is 2"),
        (dict(mass_buffer=mass["mass_buffer"][0]), "mass_buffer has shape"),
        (dict(mass_buffer=mass["mass_buffer"] > 0), "mass_buffer has dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            paged_attention(q, pool, table, lengths, one, **(good | mass | change))


def test_the_default_on_cpu_is_the_reference():
    assert default_impl() == "reference"


def test_a_platform_without_a_kernel_is_not_replaced_by_another():
    with pytest.raises(NotImplementedError, match="targets has no 'tpu'"):
        load_implementation("pallas_kernels", "targets", "tpu")


def test_queries_before_the_first_key_see_nothing():
    # Two keys, three queries: they sit at -1, 0 and 1, and see 0, 1 and 2 keys.
    keys = pool_of([0.0, 0.0], [4.0, 8.0])
    got = attend_lane(jnp.ones((3, 1, 1)), keys, 2, mass_group=0)
    np.testing.assert_allclose(got.out[:, 0, 0], [0.0, 4.0, 6.0], rtol=1e-6)
    assert not np.asarray(got.mass).any()


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize(
    "scores, length, budget, num_recent, expected",
    [
        # The two highest, in order of position.
        ([0.1, 0.9, 0.2, 0.8], 4, 2, 0, [1, 3]),
        # 0.5 three times for two places: the lowest positions.
        ([0.5, 0.1, 0.5, 0.5], 4, 2, 0, [0, 2]),
        # 0.0 and -0.0 are equal, and above -1.
        ([-1.0, -0.0, 0.0, -0.0], 4, 2, 0, [1, 2]),
        # The last two are always in; the third place goes to the best of the rest.
        ([0.3, 0.4, 0.9, 0.0, 0.1], 5, 3, 2, [2, 3, 4]),
        # A recent one would have won anyway: it does not count twice.
        ([0.3, 0.4, 0.1, 0.9], 4, 2, 1, [1, 3]),
        # More recents than places: the highest positions.
        ([9.0, 8.0, 7.0, 6.0], 4, 2, 3, [2, 3]),
        # A budget beyond the length takes everything; NaN past the length is ignored.
        ([0.1, 0.2, NAN, NAN], 2, 3, 0, [0, 1]),
        ([0.1, 0.2, 0.3, 0.4], 0, 3, 1, []),
        ([0.1, 0.2, 0.3, 0.4], 4, 0, 1, []),
    ],
)
def test_selection_by_hand(scores, length, budget, num_recent, expected):
    got = select(
        jnp.asarray([[scores]], jnp.float32),
        int32(length),
        int32(budget),
        cap=3,
        num_recent=num_recent,
    )
    assert got.counts.tolist() == [[len(expected)]]
    assert got.indices[0, 0].tolist() == expected + [0] * (3 - len(expected))


def test_selection_of_a_layer_by_hand():
    # Sums over the heads: 5, 7, 6. The heads alone would choose [0] and [1].
    scores = jnp.asarray([[[4.0, 1.0, 3.0], [1.0, 6.0, 3.0]]])
    got = select(scores, int32(3), int32(2), cap=2, per_layer=True)
    assert got.indices.tolist() == [[[1, 2], [1, 2]]]
    assert got.counts.tolist() == [[2, 2]]


@small_select
def test_selection_agrees_with_a_stable_sort(case):
    inputs = ki.select_inputs(case)
    got = select(*inputs, **case.options)
    for lane, head in np.ndindex(*got.counts.shape):
        length, budget = inputs.lengths[lane], inputs.budgets[lane]
        scores = inputs.scores[lane, head, :length]
        if case.per_layer:
            scores = functools.reduce(np.add, inputs.scores[lane, :, :length])
        count = min(length, budget)
        recent = min(case.num_recent, count)
        best = np.argsort(-scores[: length - recent], kind="stable")[: count - recent]
        expected = sorted([*best, *range(length - recent, length)])
        assert got.counts[lane, head] == count
        assert got.indices[lane, head, :count].tolist() == expected
        assert not np.asarray(got.indices[lane, head, count:]).any()


@small_select
@pytest.mark.parametrize("fault", ki.SELECT_FAULTS, ids=lambda fault: fault.__name__)
def test_selection_comparison_sees_planted_faults(case, fault):
    # Only lanes that leave something out can show a score that is wrong.
    if fault is ki.swap_score_heads and case.per_layer:
        pytest.skip("one set for all heads: their order changes nothing")
    inputs, options = ki.select_inputs(case), case.options
    expected = select(*inputs, **options)
    ki.assert_same_selection(expected, expected)
    num_seen = 0
    for lane, (length, budget) in enumerate(
        zip(case.lengths, case.budgets, strict=True)
    ):
        wanted = min(length, budget)
        by_score = case.num_recent < wanted < length
        if wanted == 0 or (fault is not ki.want_one_less and not by_score):
            continue
        faulty = select(*fault(inputs, lane), **options)
        with pytest.raises(AssertionError):
            ki.assert_same_selection(faulty, expected)
        num_seen += 1
    assert num_seen or case.name == "all_of_it"


@pytest.mark.usefixtures("no_type_checks")
def test_selection_rejects_what_does_not_fit():
    scores, one = jnp.ones((1, 1, 4)), int32(1)
    for args, options, word in (
        ((scores[0], one, one), dict(cap=1), "scores has shape"),
        ((scores.astype(jnp.bfloat16), one, one), dict(cap=1), "scores has dtype"),
        ((scores, int32(1, 1), one), dict(cap=1), "lengths has shape"),
        ((scores, one, one * 1.0), dict(cap=1), "budgets has dtype"),
        ((scores, one, one), dict(cap=0), "cap is 0"),
        ((scores, one, one), dict(cap=1, num_recent=-1), "num_recent is -1"),
    ):
        with pytest.raises(ValueError, match=word):
            select(*args, **options)


# --------------------------------------------------------------------- gather


def test_gather_by_hand():
    # Pages of two rows, D = 1, row of (page, row) = 10 * page + row. Source pages 2, 0:
    # rows 20 21 0 1. Rows 1, 2, 3 of it go to target pages 3 and 1; row 1 of page 1
    # keeps its 11. The second lane copies nothing.
    page, _, row, _ = np.indices((4, 1, 2, 2))
    pool = jnp.asarray(10.0 * page + row, jnp.float32)
    got = gather(
        pool,
        int32([2, 0], [-1, -1]),
        int32([3, 1], [7, -1]),
        int32([[1, 2, 3]], [[0, 0, 0]]),
        int32([3], [0]),
    )
    assert got[:, 0, :, 0].tolist() == [[0, 1], [1, 11], [20, 21], [21, 0]]
    np.testing.assert_array_equal(got[..., 0], got[..., 1])


def test_gather_drops_rows_without_a_target_page():
    page, _, row, _ = np.indices((3, 1, 2, 2))
    pool = jnp.asarray(10.0 * page + row, jnp.float32)
    # Rows 0 and 1 would go to page 9, which is none; row 2 goes to page 2.
    got = gather(pool, int32([0]), int32([9, 2]), int32([[0, 1, 1]]), int32([3]))
    assert got[:, 0, :, 0].tolist() == [[0, 1], [10, 11], [1, 21]]


@small_gather
def test_gather_agrees_with_numpy_bit_for_bit(case):
    inputs = ki.gather_inputs(case)
    expected = inputs.kv_pages.copy()
    size = case.page_size
    for lane, head in np.ndindex(case.num_lanes, case.num_heads):
        number = 0 if case.is_shared else head
        for n in range(inputs.counts[lane, number]):
            row = inputs.indices[lane, number, n]
            source = inputs.source_table[lane, row // size]
            target = inputs.target_table[lane, n // size]
            expected[target, head, n % size] = inputs.kv_pages[source, head, row % size]
    ki.assert_same_bits(gather(*inputs), expected)


@small_gather
@pytest.mark.parametrize("fault", ki.GATHER_FAULTS, ids=lambda fault: fault.__name__)
def test_gather_comparison_sees_planted_faults(case, fault):
    if fault is ki.swap_index_heads and case.is_shared:
        pytest.skip("one list for all heads: there is nothing to swap")
    inputs = ki.gather_inputs(case)
    expected = gather(*inputs)
    ki.assert_same_bits(expected, expected)
    for lane in np.flatnonzero(inputs.counts[:, 0]):
        with pytest.raises(AssertionError):
            ki.assert_same_bits(gather(*fault(inputs, lane)), expected)


def test_gather_writes_a_donated_pool_in_place():
    case = GATHER_CASES[0]
    args = [jnp.asarray(a) for a in ki.gather_inputs(case)]
    memory = jax.jit(gather, donate_argnums=0).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == args[0].nbytes
    assert memory.temp_size_in_bytes < args[0].nbytes


@pytest.mark.usefixtures("no_type_checks")
def test_gather_rejects_what_does_not_fit():
    pool, table = pool_of([0.0, 0.0], [0.0, 0.0])
    for args, word in (
        ((pool[0], table, table, int32([[0]]), int32([1])), "kv_pages has shape"),
        ((pool, table[0], table, int32([[0]]), int32([1])), "source_table has shape"),
        ((pool, table, table, int32([[0], [0]]), int32([1])), "indices has shape"),
        ((pool, table, table, int32([[0]]), int32([1.0]) * 1.0), "counts has dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            gather(*args)
