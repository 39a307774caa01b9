"""Inputs, comparisons and planted faults shared by the tests of every kernel.

Pools hold NaN in every row that must not be read, tables hold ids of no page past
the lengths, and needles (queries aligned with one key at a page or length edge) make
a fault of a single row visible at the tolerance of bfloat16.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm.cases import NormCase
from pallas_kernels.gather_kv.cases import GatherCase
from pallas_kernels.int8_matmul.cases import Int8Case
from pallas_kernels.matmul.cases import MatmulCase
from pallas_kernels.paged_attention import AttentionOutput, paged_attention
from pallas_kernels.paged_attention.cases import AttentionCase
from pallas_kernels.rotate_heads.cases import RotateCase
from pallas_kernels.select_tokens import SelectedTokens, select_tokens
from pallas_kernels.select_tokens.cases import SelectCase
from pallas_kernels.write_rows.cases import WriteCase

NO_PAGE = -1
OUT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Of the length of a pair: one rounding of the norm and one of the rotation.
PAIR_TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2}
NORM_TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}  # relative
MASS_TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3}
_NEEDLE_LOGIT = 12.0
_UNSIGNED = {2: np.uint16, 4: np.uint32}


class AttentionInputs(NamedTuple):
    """Array arguments of `paged_attention`, numpy."""

    q: np.ndarray
    kv_pages: np.ndarray
    page_table: np.ndarray
    kv_lengths: np.ndarray
    q_lengths: np.ndarray


class SelectInputs(NamedTuple):
    """Array arguments of `select_tokens`, numpy."""

    scores: np.ndarray
    lengths: np.ndarray
    budgets: np.ndarray


class WriteInputs(NamedTuple):
    """Array arguments of `write_rows`, numpy."""

    kv_pages: np.ndarray
    rows: np.ndarray
    pages: np.ndarray
    offsets: np.ndarray


class RotateInputs(NamedTuple):
    """Array arguments of `rotate_heads`, numpy."""

    qkv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    q_scale: np.ndarray | None
    k_scale: np.ndarray | None


class NormInputs(NamedTuple):
    """Array arguments of `add_norm`, numpy."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray


class MatmulInputs(NamedTuple):
    """Array arguments of `matmul`, numpy."""

    x: np.ndarray
    weight: np.ndarray


class Int8Inputs(NamedTuple):
    """Array arguments of `int8_matmul`, numpy; the weight is [out, in]."""

    x: np.ndarray
    values: np.ndarray
    scale: np.ndarray


class GatherInputs(NamedTuple):
    """Array arguments of `gather_kv`, numpy."""

    kv_pages: np.ndarray
    source_table: np.ndarray
    target_table: np.ndarray
    indices: np.ndarray
    counts: np.ndarray


def each_case(cases):
    """Returns a decorator that calls a test with every case, by its name."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# ------------------------------------------------------------------ attention


def attention_inputs(case: AttentionCase, seed: int = 0) -> AttentionInputs:
    """Returns inputs of `case`: scattered pages, needles, NaN wherever unused."""
    rng = np.random.default_rng(seed)
    kv_lengths, q_lengths = case.kv_length_array(), case.q_length_array()
    page_table, num_pages = _scattered_tables(
        rng, case.kv_lengths, case.page_size, case.table_width
    )
    shape = (num_pages, case.num_heads, case.page_size, 2 * case.head_size)
    kv_pages = np.full(shape, np.nan, np.float32)
    for lane, lengths in enumerate(kv_lengths):
        for head, length in enumerate(lengths):
            rows = rng.normal(size=(length, 2 * case.head_size))
            _write_rows(kv_pages, page_table[lane], head, rows)
    q = rng.normal(size=(case.num_tokens, case.num_heads, case.group_size, 1))
    q = np.asarray(q * rng.normal(size=(*q.shape[:3], case.head_size)), np.float32)
    _plant_needles(case, q, kv_pages, page_table, kv_lengths, q_lengths)
    q = q.reshape(case.num_tokens, -1, case.head_size)
    dtype = jnp.dtype(case.dtype)
    return AttentionInputs(
        q.astype(dtype), kv_pages.astype(dtype), page_table, kv_lengths, q_lengths
    )


def attention_and_reference(
    case: AttentionCase,
) -> tuple[AttentionInputs, AttentionOutput]:
    """Returns inputs of `case`, and what the reference gives for them."""
    inputs = attention_inputs(case)
    return inputs, paged_attention(*inputs, **case.options, impl="reference")


def lane_rows(case: AttentionCase) -> list[tuple[int, int]]:
    """Returns (first token, number of query rows) of every lane."""
    rows, token = [], 0
    for num_lanes, num_queries, *_ in case.groups:
        for _ in range(num_lanes):
            rows.append((token, num_queries))
            token += num_queries
    return rows


def _scattered_tables(rng, lengths, page_size, width):
    """Returns a table of random distinct pages, and the size of a pool for it."""
    num_used = sum(-(-length // page_size) for length in lengths)
    num_pages = num_used + 3
    free = rng.permutation(num_pages)
    table = np.full((len(lengths), width), NO_PAGE, np.int32)
    table[:, 1::2] = num_pages + 5
    used = 0
    for lane, length in enumerate(lengths):
        count = -(-length // page_size)
        table[lane, :count] = free[used : used + count]
        used += count
    return table, num_pages


def _write_rows(kv_pages, pages, head, rows):
    page_size = kv_pages.shape[2]
    position = np.arange(len(rows))
    kv_pages[pages[position // page_size], head, position % page_size] = rows


def _plant_needles(case, q, kv_pages, page_table, kv_lengths, q_lengths):
    """Aligns queries with keys at the edges: own, next (hidden), page edges, first."""
    for lane, (token, _) in enumerate(lane_rows(case)):
        for row in range(q_lengths[lane]):
            for head in range(case.num_heads):
                own = kv_lengths[lane, head] - q_lengths[lane] + row
                last = kv_lengths[lane, head] - 1
                page_start = own // case.page_size * case.page_size
                edges = (own, min(own + 1, last), page_start, page_start - 1, 0)
                for member in range(case.group_size):
                    key = max(0, edges[(row + head + member) % len(edges)])
                    page = page_table[lane, key // case.page_size]
                    k = kv_pages[page, head, key % case.page_size, : case.head_size]
                    factor = _NEEDLE_LOGIT * case.head_size**0.5 / (k @ k)
                    q[token + row, head, member] = k * factor


def assert_attention_close(
    actual: AttentionOutput, expected: AttentionOutput, dtype: str
) -> None:
    """Raises AssertionError unless outputs and mass agree within the dtype's bound."""
    bound = OUT_TOLERANCE[dtype]
    np.testing.assert_allclose(
        np.asarray(actual.out, np.float32),
        np.asarray(expected.out, np.float32),
        rtol=bound,
        atol=bound,
        equal_nan=False,
    )
    assert (actual.mass is None) == (expected.mass is None)
    if expected.mass is not None:
        bound = MASS_TOLERANCE[dtype]
        np.testing.assert_allclose(
            actual.mass, expected.mass, rtol=bound, atol=bound, equal_nan=False
        )
        zero = np.asarray(expected.mass) == 0
        assert not np.asarray(actual.mass)[zero].any(), "mass of a non-candidate"


def lose_page(inputs: AttentionInputs, lane: int) -> AttentionInputs:
    """The last page of a lane is taken for a page of another request."""
    table, kv_pages = inputs.page_table.copy(), inputs.kv_pages.copy()
    column = (inputs.kv_lengths[lane].max() - 1) // kv_pages.shape[2]
    other = np.setdiff1d(np.arange(len(kv_pages)), table)[0]
    rng = np.random.default_rng(lane)
    kv_pages[other] = rng.normal(size=kv_pages.shape[1:]).astype(kv_pages.dtype)
    table[lane, column] = other
    return inputs._replace(page_table=table, kv_pages=kv_pages)


def shorten_by_one(inputs: AttentionInputs, lane: int) -> AttentionInputs:
    """The length of a lane is one too small."""
    lengths = inputs.kv_lengths.copy()
    lengths[lane] -= 1
    return inputs._replace(kv_lengths=lengths)


def swap_heads(inputs: AttentionInputs, lane: int) -> AttentionInputs:
    """KV heads 0 and 1 of a lane are taken for each other."""
    kv_pages = inputs.kv_pages.copy()
    page_size = kv_pages.shape[2]
    pages = inputs.page_table[lane][: -(-inputs.kv_lengths[lane].max() // page_size)]
    kv_pages[pages, :2] = kv_pages[pages, 1::-1]
    lengths = inputs.kv_lengths.copy()
    lengths[lane, :2] = lengths[lane, 1::-1]
    return inputs._replace(kv_pages=kv_pages, kv_lengths=lengths)


def stale_tail(inputs: AttentionInputs, lane: int) -> AttentionInputs:
    """The newest key of a lane still holds the row of a rejected draft."""
    kv_pages = inputs.kv_pages.copy()
    page_size = kv_pages.shape[2]
    rng = np.random.default_rng(lane)
    for head, length in enumerate(inputs.kv_lengths[lane]):
        page = inputs.page_table[lane, (length - 1) // page_size]
        row = rng.normal(size=kv_pages.shape[3]).astype(kv_pages.dtype)
        kv_pages[page, head, (length - 1) % page_size] = row
    return inputs._replace(kv_pages=kv_pages)


ATTENTION_FAULTS: tuple[Callable[[AttentionInputs, int], AttentionInputs], ...] = (
    lose_page,
    shorten_by_one,
    swap_heads,
    stale_tail,
)


# ------------------------------------------------------------------ selection


def select_inputs(case: SelectCase, seed: int = 0) -> SelectInputs:
    """Returns heavy-tailed scores with runs of equal values; NaN past the lengths."""
    rng = np.random.default_rng(seed)
    shape = (len(case.lengths), case.num_heads, case.num_candidates)
    scores = rng.gamma(0.1, 1.0, shape)
    # Coarse values tie often, also at the threshold; some are negative or signed 0.
    coarse = rng.random(shape) < 0.5
    scores = np.where(coarse, np.round(scores * 4) / 4, scores)
    scores = np.where(rng.random(shape) < 0.1, -scores, scores).astype(np.float32)
    past = np.arange(case.num_candidates) >= np.asarray(case.lengths)[:, None, None]
    scores[np.broadcast_to(past, shape)] = np.nan
    return SelectInputs(
        scores, np.asarray(case.lengths, np.int32), np.asarray(case.budgets, np.int32)
    )


def select_and_reference(case: SelectCase) -> tuple[SelectInputs, SelectedTokens]:
    """Returns inputs of `case`, and what the reference gives for them."""
    inputs = select_inputs(case)
    return inputs, select_tokens(*inputs, **case.options, impl="reference")


def assert_same_selection(actual, expected) -> None:
    """Raises AssertionError unless counts and the indices below them are equal."""
    counts = np.asarray(expected.counts)
    np.testing.assert_array_equal(actual.counts, counts)
    used = np.arange(expected.indices.shape[-1]) < counts[..., None]
    np.testing.assert_array_equal(
        np.where(used, actual.indices, -1), np.where(used, expected.indices, -1)
    )


def lose_score(inputs: SelectInputs, lane: int) -> SelectInputs:
    """The best score of head 0 of a lane is lost."""
    scores = inputs.scores.copy()
    valid = scores[lane, 0, : inputs.lengths[lane]]
    valid[np.argmax(valid)] = valid.min() - 1.0
    return inputs._replace(scores=scores)


def start_at_one(inputs: SelectInputs, lane: int) -> SelectInputs:
    """Every score of a lane belongs to the position below its own."""
    scores = inputs.scores.copy()
    valid = scores[lane, :, : inputs.lengths[lane]]
    valid[:, :-1] = valid[:, 1:].copy()
    return inputs._replace(scores=scores)


def swap_score_heads(inputs: SelectInputs, lane: int) -> SelectInputs:
    """Heads 0 and 1 of a lane are taken for each other."""
    scores = inputs.scores.copy()
    scores[lane, :2] = scores[lane, 1::-1]
    return inputs._replace(scores=scores)


def want_one_less(inputs: SelectInputs, lane: int) -> SelectInputs:
    """The budget of a lane is one too small."""
    budgets = inputs.budgets.copy()
    budgets[lane] = min(budgets[lane], inputs.lengths[lane]) - 1
    return inputs._replace(budgets=budgets)


SELECT_FAULTS: tuple[Callable[[SelectInputs, int], SelectInputs], ...] = (
    lose_score,
    start_at_one,
    swap_score_heads,
    want_one_less,
)


# --------------------------------------------------------------------- gather


def gather_inputs(case: GatherCase, seed: int = 0) -> GatherInputs:
    """Returns a pool of random bits (NaN included) and ascending random rows."""
    rng = np.random.default_rng(seed)
    target_rows = max(1, int(case.count_array().max()))
    source_pages = -(-case.context // case.page_size)
    target_pages = -(-target_rows // case.page_size)
    lengths = (case.context,) * case.num_lanes + (target_rows,) * case.num_lanes
    tables, num_pages = _scattered_tables(
        rng, lengths, case.page_size, max(source_pages, target_pages) + 1
    )
    counts = case.count_array()
    shape = (num_pages, case.num_heads, case.page_size, 2 * case.head_size)
    dtype = jnp.dtype(case.dtype)
    unsigned = _UNSIGNED[dtype.itemsize]
    bits = rng.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    indices = np.zeros((*counts.shape, case.cap), np.int32)
    for lane, head in np.ndindex(counts.shape):
        chosen = rng.choice(case.context, counts[lane, head], replace=False)
        indices[lane, head, : len(chosen)] = np.sort(chosen)
    return GatherInputs(
        bits.view(dtype),
        tables[: case.num_lanes],
        tables[case.num_lanes :, : target_pages + 1],
        indices,
        counts,
    )


def assert_same_bits(actual, expected) -> None:
    """Raises AssertionError unless two pools are equal bit for bit."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    unsigned = _UNSIGNED[actual.dtype.itemsize]
    np.testing.assert_array_equal(actual.view(unsigned), expected.view(unsigned))


def lose_source_page(inputs: GatherInputs, lane: int) -> GatherInputs:
    """The page of the first selected row of a lane is taken for another."""
    page_size = inputs.kv_pages.shape[2]
    table = inputs.source_table.copy()
    column = inputs.indices[lane, 0, 0] // page_size
    table[lane, column] = (table[lane, column] + 1) % len(inputs.kv_pages)
    return inputs._replace(source_table=table)


def copy_one_less(inputs: GatherInputs, lane: int) -> GatherInputs:
    """One row of head 0 of a lane is not copied."""
    counts = inputs.counts.copy()
    counts[lane, 0] -= 1
    return inputs._replace(counts=counts)


def swap_index_heads(inputs: GatherInputs, lane: int) -> GatherInputs:
    """The lists of heads 0 and 1 of a lane are taken for each other."""
    indices = inputs.indices.copy()
    indices[lane, :2] = indices[lane, 1::-1]
    return inputs._replace(indices=indices)


def next_row(inputs: GatherInputs, lane: int) -> GatherInputs:
    """The last row of a lane's list is the neighbour of the one wanted."""
    indices = inputs.indices.copy()
    last = inputs.counts[lane, 0] - 1
    indices[lane, 0, last] ^= 1
    return inputs._replace(indices=indices)


GATHER_FAULTS: tuple[Callable[[GatherInputs, int], GatherInputs], ...] = (
    lose_source_page,
    copy_one_less,
    swap_index_heads,
    next_row,
)


# ---------------------------------------------------------------------- write


def write_inputs(case: WriteCase, seed: int = 0) -> WriteInputs:
    """Returns random bits (NaN included) and distinct places, two of them nowhere."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    unsigned = _UNSIGNED[dtype.itemsize]

    def bits(*shape):
        x = rng.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
        return x.view(dtype)

    H, D, ps = case.num_heads, case.head_size, case.page_size
    lists = 1 if case.is_shared else H
    flat = [
        rng.choice(case.num_pages * ps, case.num_places, False) for _ in range(lists)
    ]
    places = np.stack(flat, axis=1).astype(np.int32)
    pages, offsets = places // ps, places % ps
    if case.num_places > 2:
        pages[1, 0], pages[-1, -1] = case.num_pages, -1
    pool, rows = bits(case.num_pages, H, ps, 2 * D), bits(case.num_rows, H, 2 * D)
    return WriteInputs(pool, rows, pages, offsets)


# --------------------------------------------------------------------- rotate


def rotate_inputs(case: RotateCase, seed: int = 0) -> RotateInputs:
    """Returns heads of many sizes, some so small that eps counts, and random angles."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    size = 10.0 ** rng.uniform(-3, 1, (*case.shape[:3], 1))
    shape, projected = case.projection
    qkv = (size * rng.standard_normal(shape)).astype(jnp.dtype(projected))
    angles = rng.uniform(0, 2 * np.pi, (case.num_tokens, case.head_size // 2))
    scales = [None, None]
    if case.is_normed:
        scales = rng.uniform(0.5, 2.0, (2, case.head_size)).astype(dtype)
    tables = (turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    return RotateInputs(qkv, *tables, *scales)


def assert_rotations_agree(actual, expected) -> None:
    """Raises AssertionError unless two (queries, rows) agree, values bit for bit."""
    for got, wanted in zip(actual, expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    size = expected[0].shape[-1]
    (q, k, v), (wanted_q, wanted_k, wanted_v) = (
        (np.asarray(q), *np.split(np.asarray(rows), [size], axis=-1))
        for q, rows in (actual, expected)
    )
    tolerance = PAIR_TOLERANCE[q.dtype.name]
    for got, wanted in ((q, wanted_q), (k, wanted_k)):
        first, second = np.split(wanted.astype(np.float32), 2, axis=-1)
        bound = tolerance * np.tile(np.hypot(first, second), 2)
        error = np.abs(got.astype(np.float32) - wanted.astype(np.float32))
        assert (error <= bound).all(), f"error {np.max(error / bound)} of its bound"
    assert_same_bits(v, wanted_v)


# ----------------------------------------------------------------------- norm


def norm_inputs(case: NormCase, seed: int = 0) -> NormInputs:
    """Returns rows of many sizes, some so small that eps counts."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    size = 10.0 ** rng.uniform(-3, 1, (case.shape[0], 1))
    x, y = (size * rng.standard_normal(case.shape) for _ in range(2))
    scale = rng.uniform(0.5, 2.0, case.shape[1])
    inputs = NormInputs(*(a.astype(dtype) for a in (x, y, scale)))
    if case.num_parts:
        parts = size * rng.standard_normal((case.num_parts, *case.shape))
        inputs = inputs._replace(y=parts.astype(np.float32))
    return inputs


def assert_norms_agree(actual, expected) -> None:
    """Raises AssertionError unless two (stream, norm) agree, streams bit for bit."""
    assert_same_bits(actual[0], expected[0])
    got, wanted = (np.asarray(pair[1]) for pair in (actual, expected))
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    tolerance = NORM_TOLERANCE[got.dtype.name]
    got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    np.testing.assert_allclose(got, wanted, rtol=tolerance)


# --------------------------------------------------------------------- matmul


def whole_numbers(num_rows, num_inputs, num_columns, seed=0):
    """Rows and a weight whose product bfloat16 holds but for one rounding."""
    rng = np.random.default_rng(seed)
    shapes = (num_rows, num_inputs), (num_inputs, num_columns)
    return tuple(rng.integers(-3, 4, shape).astype(jnp.bfloat16) for shape in shapes)


def matmul_inputs(case: MatmulCase, seed: int = 0) -> MatmulInputs:
    """Returns small whole numbers: every order gives the same sum."""
    return MatmulInputs(*whole_numbers(case.num_tokens, *case.weight, seed))


# ----------------------------------------------------------------- 8-bit matmul


def int8_inputs(case: Int8Case, seed: int = 0) -> Int8Inputs:
    """Returns whole numbers, of which every order gives the same sum, and scales."""
    rng = np.random.default_rng(seed)
    (num_rows, size_in), values, scale = (s.shape for s in case.shapes)
    return Int8Inputs(
        rng.integers(-3, 4, (num_rows, size_in)).astype(jnp.bfloat16),
        rng.integers(-127, 128, values).astype(np.int8),
        rng.uniform(0.5, 2.0, scale).astype(np.float32),
    )
