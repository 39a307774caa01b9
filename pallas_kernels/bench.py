"""Times the kernels on this device against its read and copy rates, and rivals.

    python -m pallas_kernels.bench --output experiments/results/kernels_h100.json

One compiled program runs the same call for the layers of a step: queries, scores,
pools or tables differ from layer to layer, lengths do not. Programs run behind each
other for a while; the time is divided by programs and layers, and the median over
repeats is reported; of `rotate` and `norm` on a GPU, what the profiler says of their
kernels. Programs of earlier cases are dropped before. Inputs exceed the L2 cache.
Errors are against the float32 references, with needles and NaN in every unused row.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_norm import add_norm
from pallas_kernels.cases import (
    ATTENTION_CASES,
    GATHER_CASES,
    NORM_CASES,
    ROTATE_CASES,
    WRITE_CASES,
    AttentionCase,
    by_name,
)
from pallas_kernels.common import default_impl
from pallas_kernels.gather_kv import gather_kv
from pallas_kernels.paged_attention import LaneGroup, paged_attention
from pallas_kernels.prefill_cases import PREFILL_CASES, num_flops
from pallas_kernels.rotate_heads import rotate_heads
from pallas_kernels.select_cases import SELECT_CASES
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.timing import (
    SECONDS,
    device_us,
    drop_programs,
    measure_rates,
    relative_error,
    time_donated_us,
    time_us,
)
from pallas_kernels.write_rows import write_rows

_LAYERS = 32  # of one program, as models have; half as many selections
_POOL_BYTES = 1.5e9  # of one pool; layers take turns in it
_NEEDLE_LOGIT = 12.0


def _attention_cases() -> dict[str, AttentionCase]:
    cases = {}
    for name in ("verify_8k", "verify_32k"):
        case = by_name(ATTENTION_CASES, name)
        cases[name] = dataclasses.replace(case, mass_group=None)
        for rows in ("edges", "all"):
            new = dataclasses.replace(case, mass_group=0, mass_rows=rows)
            cases[f"{name}_{rows}"] = new
    for name in ("draft_410", "draft_1638", "mixed", "verify_8k_d64"):
        case = by_name(ATTENTION_CASES, name)
        cases[name] = dataclasses.replace(case, mass_group=None)
    cases["step_2560"] = by_name(ATTENTION_CASES, "step_2560")
    for name in ("prefill_6k", "prefill_12k"):
        cases[name] = by_name(PREFILL_CASES, name)
    return cases


ATTENTION = _attention_cases()
SELECT = ("select_8k", "select_32k", "select_40k", "select_40k_full")
GATHER = ("gather_512b",)
WRITE = ("write_plain", "write_136")
ROTATE = ("rotate_136", "rotate_136_parts", "rotate_d64", "rotate_2184")
NORM = ("norm_136", "norm_136_parts", "norm_49_parts", "norm_512", "norm_2184")
NAMES = (*ATTENTION, *SELECT, *GATHER, *WRITE, *ROTATE, *NORM)


# ------------------------------------------------------------------ attention


def attention_layers(case: AttentionCase, seed: int = 0) -> tuple[list, tuple]:
    """Returns queries and table of every layer; pool and lengths of all of them."""
    rng = np.random.default_rng(seed)
    kv_lengths, q_lengths = case.kv_length_array(), case.q_length_array()
    used = -(-kv_lengths.max(1) // case.page_size)
    turns = int(max(1, min(4, _POOL_BYTES // case.num_kv_bytes)))
    pages = rng.permutation(turns * used.sum()).astype(np.int32)
    tables = np.full((turns, case.num_lanes, case.table_width), -1, np.int32)
    for turn, lane in np.ndindex(turns, case.num_lanes):
        tables[turn, lane, : used[lane]], pages = np.split(pages, [used[lane]])[:2]
    shape = (
        int(turns * used.sum()),
        case.num_heads,
        case.page_size,
        2 * case.head_size,
    )
    key = jax.random.key(seed)
    last, end = tables[:, np.arange(len(used)), used - 1], kv_lengths.max(1)
    unused = np.arange(case.page_size) >= (end - (used - 1) * case.page_size)[:, None]
    pool = _draw_pool(key, shape, last, np.broadcast_to(unused, (turns, *unused.shape)))
    layers = []
    for layer in range(_LAYERS):
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
    num_queries = [queries for lanes, queries in case.groups for _ in range(lanes)]
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


def bench_attention(case: AttentionCase, impl: str, read_rate: float) -> dict:
    """Returns time, rate and errors of one attention case, and cuDNN's time."""
    layers, shared = attention_layers(case)
    options = dict(
        groups=tuple(LaneGroup(*group) for group in case.groups),
        mass_group=case.mass_group,
        mass_rows=case.mass_rows,
    )

    def attend(q, table, pool, kv_lengths, q_lengths, impl=impl):
        args = (q, pool, table, kv_lengths, q_lengths)
        return paged_attention(*args, **options, impl=impl)

    us = time_us(attend, layers, shared)
    got = jax.jit(attend)(*layers[0], *shared)
    expected = attend(*layers[0], *shared, impl="reference")
    result = dict(
        us=us,
        bytes=case.num_kv_bytes,
        tb_per_s=case.num_kv_bytes / us / 1e6,
        fraction_of_read=case.num_kv_bytes / us * 1e6 / read_rate,
        tflop_per_s=num_flops(case) / us / 1e6,
        out_error=relative_error(got.out, expected.out),
    )
    if case.mass_group is not None:
        result["mass_error"] = relative_error(got.mass, expected.mass)
    elif len(case.groups) == 1:
        del layers, shared, got, expected
        result["cudnn_us"] = _time_cudnn(case)
    return result


def _time_cudnn(case: AttentionCase) -> float:
    """Returns the time of cuDNN attention over contiguous keys and values.

    Every query sees every key: its causal mask has no keys in front of the first query.
    """
    lanes, queries = case.groups[0]
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
    return time_us(attend, layers * (_LAYERS // len(layers)))


# --------------------------------------------- selection, gather, small kernels


def bench_select(name: str, impl: str) -> dict:
    """Returns time and exactness of one selection case, and the time of top_k."""
    case = by_name(SELECT_CASES, name)
    shape = (len(case.lengths), case.num_heads, case.num_candidates)
    lengths, budgets = (jnp.asarray(x, jnp.int32) for x in (case.lengths, case.budgets))
    keys = jax.random.split(jax.random.key(0), _LAYERS // 2)
    scores = [jax.nn.softmax(3 * jax.random.normal(key, shape)) for key in keys]
    options = dict(cap=case.cap, num_recent=case.num_recent, per_layer=case.per_layer)
    select = functools.partial(select_tokens, **options, impl=impl)
    us = time_us(select, [(score, lengths, budgets) for score in scores])
    tied = jnp.round(scores[0] * case.num_candidates)  # few values: ties everywhere
    same = []
    for score in (scores[0], scores[1], tied):
        got = jax.jit(select)(score, lengths, budgets)
        expected = select_tokens(score, lengths, budgets, **options, impl="reference")
        same.append(_same_selection(got, expected))
    rows = [(score.reshape(-1, case.num_candidates),) for score in scores]
    return dict(
        us=us,
        tied_us=time_us(select, [(tied, lengths, budgets)] * (_LAYERS // 2)),
        exact=all(same),
        top_k_us=time_us(lambda x: jax.lax.top_k(x, case.cap), rows),
    )


def _same_selection(got, expected) -> bool:
    """Returns whether counts are equal, and indices as far as these go."""
    is_chosen = jnp.arange(expected.indices.shape[-1]) < expected.counts[..., None]
    indices = jnp.where(is_chosen, got.indices - expected.indices, 0)
    return bool((got.counts == expected.counts).all() and (indices == 0).all())


def bench_gather(name: str, impl: str, copy_rate: float) -> dict:
    """Returns time, rate and exactness of one gather case, and XLA's time."""
    case = by_name(GATHER_CASES, name)
    rng = np.random.default_rng(0)
    ps, lanes, heads = case.page_size, case.num_lanes, case.num_heads
    widths = (-(-case.context // ps), -(-case.cap // ps))
    pages = rng.permutation(lanes * sum(widths)).astype(np.int32)
    source, target = np.split(pages, [lanes * widths[0]])
    source, target = source.reshape(lanes, -1), target.reshape(lanes, -1)
    shape = (len(pages), heads, ps, 2 * case.head_size)
    pool = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    indices = np.empty((lanes, heads, case.cap), np.int32)
    for index in np.ndindex(lanes, heads):
        indices[index] = np.sort(rng.choice(case.context, case.cap, replace=False))
    args = jax.device_put((source, target, indices, case.count_array()))
    expected = gather_kv(pool, *args, impl="reference")
    gather = functools.partial(gather_kv, impl=impl)
    same = bool((jax.jit(gather)(pool, *args) == expected).all())
    del expected

    def gather_layers(pool):
        for _ in range(_LAYERS):
            pool = gather(pool, *args)
        return pool

    us = time_donated_us(gather_layers, pool + 0) / _LAYERS
    flat = source[np.arange(lanes)[:, None, None], indices // ps]
    flat = (flat * heads + np.arange(heads)[:, None]) * ps + indices % ps
    rows = pool.reshape(-1, shape[-1])
    turned = [(jnp.roll(jnp.asarray(flat), i, 0),) for i in range(_LAYERS)]
    xla = time_us(lambda index, rows: rows[index], turned, (rows,))
    moved = 2 * case.num_copied_bytes
    return dict(
        us=us,
        bytes=moved,
        tb_per_s=moved / us / 1e6,
        fraction_of_copy=moved / us * 1e6 / copy_rate,
        exact=same,
        xla_gather_us=xla,
    )


def bench_write(name: str, impl: str) -> dict:
    """Returns time and exactness of one case of new rows, and XLA's scatter's time."""
    case = by_name(WRITE_CASES, name)
    rng = np.random.default_rng(0)
    places = rng.choice(case.num_pages * case.page_size, (case.num_places, 1), False)
    places = np.divmod(places.astype(np.int32), case.page_size)
    shape = (case.num_rows, case.num_heads, 2 * case.head_size)
    keys = jax.random.split(jax.random.key(0), _LAYERS)
    layers = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    shape = (case.num_pages, case.num_heads, case.page_size, 2 * case.head_size)
    pool = jax.random.normal(keys[0], shape, jnp.bfloat16)

    def write(pool, rows, impl=impl):
        args = (pool, rows, *places)
        return write_rows(*args, copies_from=case.copies_from, impl=impl)

    def write_layers(pool, impl=impl):
        for rows in layers:
            pool = write(pool, rows, impl=impl)
        return pool

    expected = write(pool, layers[0], impl="reference")
    same = bool((jax.jit(write)(pool, layers[0]) == expected).all())
    scatter_layers = functools.partial(write_layers, impl="reference")
    return dict(
        us=time_donated_us(write_layers, pool + 0) / _LAYERS,
        exact=same,
        xla_scatter_us=time_donated_us(scatter_layers, pool + 0) / _LAYERS,
    )


def bench_rotate(name: str, impl: str) -> dict:
    """Returns time and error of one case of new heads, and the time of XLA."""
    case = by_name(ROTATE_CASES, name)
    keys = jax.random.split(jax.random.key(0), _LAYERS)
    layers = [(jax.random.normal(key, *case.projection),) for key in keys]
    angles = jax.random.uniform(keys[0], (case.num_tokens, case.head_size // 2))
    scale = jnp.linspace(0.5, 2.0, case.head_size, dtype=jnp.bfloat16)
    shared = (jnp.cos(angles), jnp.sin(angles), *[scale, scale] * case.is_normed)
    rotate = functools.partial(rotate_heads, eps=1e-6, dtype=jnp.bfloat16)
    return _against_xla(rotate, layers, shared, impl)


def bench_norm(name: str, impl: str) -> dict:
    """Returns time and error of one case of a stream's sum, and the time of XLA."""
    case = by_name(NORM_CASES, name)
    keys = jax.random.split(jax.random.key(0), 2 * _LAYERS)
    streams = [jax.random.normal(key, case.shape, jnp.bfloat16) for key in keys]
    added = streams[1::2]
    if case.num_parts:
        shape = case.num_parts, *case.shape
        added = [jax.random.normal(key, shape) for key in keys[1::2]]
    layers = list(zip(streams[::2], added, strict=True))
    shared = (jnp.linspace(0.5, 2.0, case.shape[1], dtype=jnp.bfloat16),)
    return _against_xla(functools.partial(add_norm, eps=1e-6), layers, shared, impl)


def _against_xla(kernel, layers: list[tuple], shared: tuple, impl: str) -> dict:
    run, reference = (functools.partial(kernel, impl=i) for i in (impl, "reference"))
    # On a GPU both take less than the host needs to launch them.
    clock = device_us if impl == "gpu" else time_us
    us = clock(run, layers, shared)
    got, expected = (fn(*layers[0], *shared) for fn in (run, reference))
    moved = sum(x.nbytes for x in (*layers[0], *got))
    return dict(
        us=us,
        bytes=moved,
        tb_per_s=moved / us / 1e6,
        error=max(map(relative_error, got, expected)),
        xla_us=clock(reference, layers, shared),
    )


# ---------------------------------------------------------------------- report


def run(names: list[str], impl: str, commit: str, output: str | None) -> None:
    """Prints one line per case, and writes the report so far after each.

    Raises:
      ValueError: XLA_FLAGS let calls of a program run side by side.
    """
    if "CONCURRENT" in os.environ.get("XLA_FLAGS", ""):
        raise ValueError(
            "XLA_FLAGS has command_buffer_scheduling_mode=CONCURRENT: calls would run "
            "side by side, and none be timed alone; leave it out"
        )
    read_rate, copy_rate = measure_rates()
    report = dict(
        device=jax.devices()[0].device_kind,
        commit=commit,
        impl=impl,
        versions=dict(jax=jax.__version__, numpy=np.__version__),
        date=time.strftime("%Y-%m-%d"),
        method=__doc__.split("\n\n")[2].replace("\n", " "),
        layers=_LAYERS,
        seconds_of_a_repeat=SECONDS,
        read_tb_per_s=read_rate / 1e12,
        copy_tb_per_s=copy_rate / 1e12,
        cases={},
    )
    print(f"read {read_rate / 1e12:.3f} TB/s, copy {copy_rate / 1e12:.3f} TB/s")
    for name in names:
        drop_programs()
        if name in ATTENTION:
            result = bench_attention(ATTENTION[name], impl, read_rate)
        elif name in SELECT:
            result = bench_select(name, impl)
        elif name in WRITE:
            result = bench_write(name, impl)
        elif name in ROTATE:
            result = bench_rotate(name, impl)
        elif name in NORM:
            result = bench_norm(name, impl)
        else:
            result = bench_gather(name, impl, copy_rate)
        report["cases"][name] = result
        values = (f"{k} {_short(v)}" for k, v in result.items())
        print(f"{name:17s}", ", ".join(values), flush=True)
        _compare(report["cases"])
        if output:
            with open(output, "w") as file:
                json.dump(report, file, indent=1)
                file.write("\n")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _compare(cases: dict) -> None:
    """Adds ratios between cases to their results."""
    for name, result in cases.items():
        plain = cases.get(name.rsplit("_", 1)[0])
        if "mass_error" in result and plain:
            result["ratio_to_plain"] = result["us"] / plain["us"]
    if {"mixed", "verify_8k", "draft_410"} <= cases.keys():
        parts = cases["verify_8k"]["us"] + cases["draft_410"]["us"]
        cases["mixed"]["ratio_to_sum"] = cases["mixed"]["us"] / parts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--impl", default=None, help="default: of this platform")
    parser.add_argument("--cases", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--commit", default="unknown", help="recorded in the file")
    options = parser.parse_args()
    impl = options.impl or default_impl()
    run(list(options.cases), impl, options.commit, options.output)


if __name__ == "__main__":
    main()
