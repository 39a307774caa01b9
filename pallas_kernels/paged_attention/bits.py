"""Compares the bits of attention rows between calls that must not change them.

The rows of some requests are computed one by one, as plain decoding does, and again in
other company: several rows of a request at once, among other lanes, in another
order, with a mass, with other pages, tables or numbers of CTAs. Prompt rows are
computed in chunks, and again in other chunks. Rows are known by their request and
position; rows of the pool that belong to nobody are NaN.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import TIMED, Case
from pallas_kernels.paged_attention.api import LaneGroup
from pallas_kernels.paged_attention.gpu import TUNED, paged_attention_gpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsCase(Case):
    """Requests, and how they are called."""

    lengths: tuple[int, ...]  # keys of each request
    piece: int | None
    num_heads: int = 8
    group_size: int = 4
    head_size: int = 128
    page_size: int = 64
    other_page_size: int = 16
    num_queries: tuple[int, ...] = (2, 3, 5, 9)  # of verifications
    num_ctas: int = 264
    other_num_ctas: int = 100
    draft_lengths: tuple[int, ...] = (137,) * 20  # beside, where there are any
    chunk: int = 0  # queries of a chunk of the longer requests, a multiple of 8
    tags: frozenset[str] = TIMED


class Lane(NamedTuple):
    """The last `num_rows` of the first `length` positions of a request."""

    request: int
    length: int
    num_rows: int


class Result(NamedTuple):
    """Bits by (request, position), and the mass by request, where there is one."""

    rows: dict[tuple[int, int], np.ndarray]
    mass: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of attention, for lanes of equal shape."""

    lanes: tuple[Lane, ...]
    num_queries: int
    page_size: int
    num_ctas: int
    mass_rows: str | None = None
    draft_lengths: tuple[int, ...] = ()
    extra_columns: int = 0


def variations(case: BitsCase) -> Iterator[tuple[str, Call]]:
    """Yields names and calls; the first computes every row alone."""
    most = max(case.num_queries)
    single = tuple(
        Lane(r, length - i, 1)
        for r, length in enumerate(case.lengths)
        for i in range(min(most, length))
    )
    plain = Call(
        lanes=single,
        num_queries=1,
        page_size=case.page_size,
        num_ctas=case.num_ctas,
    )
    yield "plain", plain
    order = np.random.default_rng(1).permutation(len(single))
    yield "plain, other order", _with(plain, lanes=tuple(single[i] for i in order))
    half = [
        lane if i % 2 else Lane(lane.request, (lane.length + 1) // 2, 1)
        for i, lane in enumerate(single)
    ]
    yield "plain, other neighbours", _with(plain, lanes=tuple(half))
    for number in case.num_queries:
        lanes = tuple(
            Lane(r, length, min(number, length))
            for r, length in enumerate(case.lengths)
        )
        verify = _with(plain, lanes=lanes, num_queries=number)
        yield f"{number} rows", verify
    fewer = tuple(lane._replace(num_rows=1 + lane.num_rows // 2) for lane in lanes)
    yield f"fewer rows of {number}", _with(verify, lanes=fewer)
    drafts = dict(draft_lengths=case.draft_lengths)
    for rows in ("edges", "all"):
        yield f"mass of {rows}", _with(verify, mass_rows=rows)
        yield f"mass of {rows}, drafts", _with(verify, mass_rows=rows, **drafts)
    yield "drafts", _with(verify, **drafts)
    yield "drafts, reversed", _with(verify, lanes=lanes[::-1], **drafts)
    yield "other CTAs", _with(verify, num_ctas=case.other_num_ctas)
    yield "other table", _with(verify, extra_columns=3 * 1024 // case.page_size)
    yield "one lane", _with(plain, lanes=single[-most:][:1])
    if case.chunk:
        yield from _of_prompts(case, plain)
    yield "other pages", _with(verify, page_size=case.other_page_size)


def _of_prompts(case: BitsCase, call: Call) -> Iterator[tuple[str, Call]]:
    """Yields the same of the last two chunks of every longer request."""
    size = case.chunk
    long = [(r, n) for r, n in enumerate(case.lengths) if n >= 2 * size]

    def cut(*ends):  # how far from the end chunks end, the first with fewer rows
        return tuple(
            Lane(r, n - end, min(size, n - end - (n - 2 * size)))
            for r, n in long
            for end in ends
        )

    chunks = _with(call, lanes=cut(size, 0), num_queries=size)
    yield "prompt", chunks
    yield "prompt, reversed", _with(chunks, lanes=chunks.lanes[::-1])
    ends = size + size // 2, size // 2 + 3, 0
    yield "prompt, other chunks", _with(chunks, lanes=cut(*ends))
    halves = tuple(
        Lane(r, n - i * size // 2, size // 2) for r, n in long for i in range(4)
    )
    halves = _with(chunks, lanes=halves, num_queries=size // 2)
    yield "prompt, smaller chunks", halves
    pages = _with(chunks, page_size=case.other_page_size, extra_columns=3)
    yield "prompt, other pages", pages
    yield "prompt, one lane", _with(chunks, lanes=chunks.lanes[-1:])


_with = dataclasses.replace


class Requests:
    """Keys, values and queries of the requests of a case, drafts behind them."""

    def __init__(self, case: BitsCase, seed: int = 0):
        self.case = case
        self.lengths = (*case.lengths, *case.draft_lengths)
        most = max(*case.num_queries, 2 * case.chunk)
        self.num_known = [min(most, n) for n in self.lengths]  # queries, at the end
        keys, queries = jax.random.split(jax.random.key(seed))
        shape = (case.num_heads, 2 * case.head_size)
        self._texts = _normal(keys, (sum(self.lengths), *shape))
        shape = (case.num_heads * case.group_size, case.head_size)
        self._queries = 2 * _normal(queries, (sum(self.num_known), *shape))
        self._pool = None, None  # the last one: they are large

    def pool(self, page_size: int) -> tuple[jax.Array, list[np.ndarray]]:
        """Returns a pool, and the pages of every request, scattered."""
        if self._pool[0] != page_size:
            self._pool = page_size, self._make_pool(page_size)
        return self._pool[1]

    def _make_pool(self, page_size):
        rng = np.random.default_rng(page_size)
        counts = [-(-length // page_size) for length in self.lengths]
        pages = rng.permutation(sum(counts)).astype(np.int32)
        pages = np.split(pages, np.cumsum(counts)[:-1])
        rows = [np.arange(length) for length in self.lengths]
        page = [own[at // page_size] for own, at in zip(pages, rows, strict=True)]
        page, row = np.concatenate(page), np.concatenate(rows) % page_size
        shape = (sum(counts), self.case.num_heads, page_size, 2 * self.case.head_size)
        pool = jnp.full(shape, jnp.nan, jnp.bfloat16)
        return pool.at[page, :, row].set(self._texts), pages

    def arguments(self, call: Call) -> tuple:
        """Returns q, pool, page table, kv_lengths and q_lengths of a call."""
        first_draft = len(self.case.lengths)
        drafts = [
            Lane(first_draft + i, length, 1)
            for i, length in enumerate(call.draft_lengths)
        ]
        lanes = (*drafts, *call.lanes)
        pool, pages = self.pool(call.page_size)
        width = max(len(pages[lane.request]) for lane in lanes) + call.extra_columns
        table = np.full((len(lanes), width), -1, np.int32)
        for own, lane in zip(table, lanes, strict=True):
            own[: len(pages[lane.request])] = pages[lane.request]
        lengths = np.int32([lane.length for lane in lanes])[:, None]
        lengths = np.repeat(lengths, self.case.num_heads, axis=1)
        index = [self._query_index(lane, 1) for lane in drafts]
        index += [self._query_index(lane, call.num_queries) for lane in call.lanes]
        q = self._queries.at[np.concatenate(index)].get(mode="fill", fill_value=jnp.nan)
        return q, pool, table, lengths, np.int32([lane.num_rows for lane in lanes])

    def _query_index(self, lane: Lane, num_queries: int) -> np.ndarray:
        """Returns where the queries of a lane are, far away for rows it has not."""
        known = self.num_known[lane.request]
        position = lane.length - lane.num_rows + np.arange(num_queries)
        index = sum(self.num_known[: lane.request]) + position % known
        return np.where(np.arange(num_queries) < lane.num_rows, index, 2**30)


def _normal(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16)


def groups_of(call: Call, piece: int | None) -> tuple[LaneGroup, ...]:
    """Returns the lane groups of a call."""
    groups = (LaneGroup(len(call.lanes), call.num_queries, piece),)
    if call.draft_lengths:
        groups = (LaneGroup(len(call.draft_lengths), 1), *groups)
    return groups


def _run_jitted(fn: Callable, arguments: tuple) -> Any:
    return jax.jit(fn)(*arguments)


def compute(
    requests: Requests,
    call: Call,
    *,
    run: Callable[[Callable, tuple], Any] = _run_jitted,
    **options,
) -> Result:
    """Returns the rows and the masses of a call.

    Args:
      requests: what is computed.
      call: in which company.
      run: calls a function with arguments, compiled in some way.
      **options: of `paged_attention_gpu`.
    """
    case, has_mass = requests.case, call.mass_rows is not None
    groups = groups_of(call, case.piece)
    attend = functools.partial(
        paged_attention_gpu,
        groups=groups,
        mass_group=len(groups) - 1 if has_mass else None,
        mass_rows=call.mass_rows or "all",
        config=_with(TUNED[case.head_size], num_ctas=call.num_ctas),
        **options,
    )
    result = run(attend, requests.arguments(call))
    out = np.asarray(result.out).view(np.uint16)[len(call.draft_lengths) :]
    rows, mass = {}, {}
    for i, lane in enumerate(call.lanes):
        for row in range(lane.num_rows):
            position = lane.length - lane.num_rows + row
            rows[lane.request, position] = out[i * call.num_queries + row]
        if has_mass:
            candidates = lane.length - lane.num_rows
            mass[lane.request] = np.asarray(result.mass)[i, :, :candidates]
    return Result(rows, mass)


def count_differing(result: Result, base: Result) -> tuple[int, int]:
    """Returns the rows that differ in some bit, and the rows that both have."""
    common = result.rows.keys() & base.rows.keys()
    differing = [
        key for key in common if not np.array_equal(result.rows[key], base.rows[key])
    ]
    return len(differing), len(common)


def compare(case: BitsCase, **options) -> dict[str, dict[str, int]]:
    """Returns, by variation, rows compared with plain decoding and how many differ.

    Masses are compared with those of the same rows in other company.
    """
    requests, bases, masses, found = Requests(case), {}, {}, {}
    for name, call in variations(case):
        result = compute(requests, call, **options)
        is_prompt = name.startswith("prompt")
        differing, rows = count_differing(result, bases.setdefault(is_prompt, result))
        found[name] = dict(rows=rows, differing=differing)
        if call.mass_rows:
            first = masses.setdefault(call.mass_rows, result.mass)
            same = [np.array_equal(first[r], result.mass[r]) for r in first]
            found[name]["differing_masses"] = len(same) - sum(same)
    return found
