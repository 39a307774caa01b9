"""Times paged attention, and cuDNN over contiguous keys."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import by_name
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cases import ATTENTION_CASES, AttentionCase
from pallas_kernels.timing import Rates, relative_error, time_us

_POOL_BYTES = 1.5e9  # of one pool; layers take turns in it
_NEEDLE_LOGIT = 12.0


def _timed_cases() -> tuple[AttentionCase, ...]:
    """Returns the cases that are timed, most of them without mass."""
    cases = []
    for name in ("verify_8k", "verify_32k"):
        case = by_name(ATTENTION_CASES, name)
        cases.append(dataclasses.replace(case, mass_group=None))
        for rows in ("edges", "all"):
            new = dict(name=f"{name}_{rows}", mass_group=0, mass_rows=rows)
            cases.append(dataclasses.replace(case, **new))
    for name in ("draft_410", "draft_1638", "mixed", "verify_8k_d64"):
        case = by_name(ATTENTION_CASES, name)
        cases.append(dataclasses.replace(case, mass_group=None))
    for name in ("step_2560", "prefill_6k", "prefill_12k"):
        cases.append(by_name(ATTENTION_CASES, name))
    return tuple(cases)


CASES = _timed_cases()


def bench(case: AttentionCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time, rate and errors of one case, and cuDNN's time."""
    result = time_case(case, impl=impl, rates=rates, num_layers=num_layers)
    if case.mass_group is None and len(case.groups) == 1:
        if jax.default_backend() == "gpu":
            result["cudnn_us"] = _time_cudnn(case, num_layers)
    return result


def time_case(
    case: AttentionCase,
    *,
    impl: str,
    rates: Rates,
    num_layers: int,
    against: tuple[AttentionCase, str] | None = None,
) -> dict:
    """Returns time, rate and errors of one case, against another and its `impl`."""
    layers, shared = attention_layers(case, num_layers)

    def call(case, impl):
        def attend(q, table, pool, kv_lengths, q_lengths):
            args = (q, pool, table, kv_lengths, q_lengths)
            return paged_attention(*args, **case.options, impl=impl)

        return attend

    attend = call(case, impl)
    us = time_us(attend, layers, shared)
    got = jax.jit(attend)(*layers[0], *shared)
    expected = call(*(against or (case, "reference")))(*layers[0], *shared)
    result = dict(
        us=us,
        bytes=case.num_kv_bytes,
        tb_per_s=case.num_kv_bytes / us / 1e6,
        fraction_of_read=case.num_kv_bytes / us * 1e6 / rates.read,
        tflop_per_s=case.num_flops / us / 1e6,
        out_error=relative_error(got.out, expected.out),
    )
    if case.mass_group is not None:
        result["mass_error"] = relative_error(got.mass, expected.mass)
    return result


def attention_layers(
    case: AttentionCase, num_layers: int, seed: int = 0
) -> tuple[list, tuple]:
    """Returns queries and table of every layer; pool and lengths of all of them."""
    rng = np.random.default_rng(seed)
    kv_lengths, q_lengths = case.kv_length_array(), case.q_length_array()
    used = -(-kv_lengths.max(1) // case.page_size)
    turns = int(max(1, min(4, _POOL_BYTES // case.num_kv_bytes)))
    pages = rng.permutation(turns * used.sum()).astype(np.int32)
    tables = np.full((turns, case.num_lanes, case.table_width), -1, np.int32)
    for turn, lane in np.ndindex(turns, case.num_lanes):
        tables[turn, lane, : used[lane]], pages = np.split(pages, [used[lane]])[:2]
    shape = (int(turns * used.sum()), *case.shapes[1].shape[1:])
    key = jax.random.key(seed)
    last, end = tables[:, np.arange(len(used)), used - 1], kv_lengths.max(1)
    unused = np.arange(case.page_size) >= (end - (used - 1) * case.page_size)[:, None]
    pool = _draw_pool(key, shape, last, np.broadcast_to(unused, (turns, *unused.shape)))
    layers = []
    for layer in range(num_layers):
        table = tables[layer % turns]
        where = _needle_places(case, table)
        q = _draw_queries(jax.random.fold_in(key, layer), pool, *where)
        layers.append((q, jnp.asarray(table)))
    return layers, (pool, jnp.asarray(kv_lengths), jnp.asarray(q_lengths))


@functools.partial(jax.jit, static_argnums=1)
def _draw_pool(key, shape, last_pages, unused):
    """Returns random pages; rows `unused` of the last page of each lane are NaN."""
    pool = jax.random.normal(key, shape, jnp.bfloat16)
    rows = jnp.where(unused[:, :, None, :, None], jnp.nan, pool[last_pages])
    return pool.at[last_pages].set(rows.astype(pool.dtype))


def _needle_places(case, table):
    """Returns page and row, [T, H, G], of the key that each query may be aligned with.

    Keys at edges take turns: the own one, the next, the first of the page, and the one
    before it.
    """
    num_queries = [queries for lanes, queries, *_ in case.groups for _ in range(lanes)]
    lane = np.repeat(np.arange(case.num_lanes), num_queries)
    query = np.concatenate([np.arange(queries) for queries in num_queries])
    length, q_len = np.asarray(case.kv_lengths)[lane], case.q_length_array()[lane]
    own = length - q_len + query
    page_start = own // case.page_size * case.page_size
    edges = np.stack([own, np.minimum(own + 1, length - 1), page_start, page_start - 1])
    shape = (case.num_tokens, case.num_heads, case.group_size)
    token, head, member = np.indices(shape)
    position = np.maximum(edges[(token + head + member) % 4, token], 0)
    return table[lane[token], position // case.page_size], position % case.page_size


@jax.jit
def _draw_queries(key, pool, page, row):
    """Returns random queries; every third token is aligned with a key."""
    head_size = pool.shape[3] // 2
    token, head, _ = np.indices(page.shape)
    k = pool[page, head, row, :head_size].astype(jnp.float32)
    norm = jnp.sum(k * k, axis=-1, keepdims=True)
    needle = k * (_NEEDLE_LOGIT * math.sqrt(head_size) / norm)
    q = jax.random.normal(key, k.shape, jnp.float32)
    q = jnp.where((token % 3 == 0)[..., None], needle, q)
    return q.reshape(len(page), -1, head_size).astype(jnp.bfloat16)


def _time_cudnn(case: AttentionCase, num_layers: int) -> float:
    """Returns the time of cuDNN attention over contiguous keys and values.

    Every query sees every key: its causal mask has no keys in front of the first query.
    """
    lanes, queries = case.groups[0][:2]
    q_shape = (lanes, queries, case.num_heads * case.group_size, case.head_size)
    kv_shape = (lanes, case.kv_lengths[0], case.num_heads, case.head_size)
    kv_bytes = 4 * math.prod(kv_shape)
    layers = []
    for layer in range(max(1, min(4, int(_POOL_BYTES // kv_bytes)))):
        keys = jax.random.split(jax.random.key(layer), 3)
        shapes = (q_shape, kv_shape, kv_shape)
        pairs = zip(keys, shapes, strict=True)
        layers.append(tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in pairs))
    attend = functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn", scale=0.1
    )
    return time_us(attend, layers * (num_layers // len(layers)))
