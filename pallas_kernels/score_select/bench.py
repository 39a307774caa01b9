"""Times scoring by an index and selection, alone.

    python -m pallas_kernels.score_select.bench --output FILE --commit C

Layers of a program have codes and queries of their own. Bytes are those of the 16
channels that a KV head's queries read, of the ranges by which these are chosen, and of
the lists; their rate is compared with that of a large read in the same run. `us` is the
time of a layer in a program of many, `kernel_us` what the profiler says of the kernel.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import by_name, tagged
from pallas_kernels.score_select.api import score_select
from pallas_kernels.score_select.cases import SCORE_CASES, ScoreCase
from pallas_kernels.score_select.reference import (
    NUM_CHANNELS,
    SAMPLED_GROUPS,
    index_scores,
    ranks_of,
)
from pallas_kernels.timing import Rates, device_us, time_us

CASES = (*tagged(SCORE_CASES, "h100"), by_name(SCORE_CASES, "score_456_2k_page_16"))
INDEXES = 4  # of a program: more than an L2 cache holds


def bench(case: ScoreCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time and rate of one case, and how its picks compare."""
    keys = jax.random.split(jax.random.key(0), num_layers + INDEXES)
    indexes = [make_codes(case, key) for key in keys[:INDEXES]]
    q, _, table, *_ = case.shapes
    lengths, budgets = (jnp.asarray(x, jnp.int32) for x in (case.lengths, case.budgets))
    shared = make_table(case), lengths, budgets
    layers = [
        (jax.random.normal(key, q.shape, q.dtype), indexes[i % INDEXES])
        for i, key in enumerate(keys[INDEXES:])
    ]
    del table
    select = functools.partial(score_select, **case.options, impl=impl)
    us = time_us(select, layers, shared)
    moved = num_bytes_read(case)
    result = dict(
        us=us,
        bytes=moved,
        tb_per_s=moved / us / 1e6,
        fraction_of_read=moved / us * 1e6 / rates.read,
    )
    if impl == "gpu":
        result["kernel_us"] = device_us(select, layers, shared)
    return result | compare(select, case, *layers[0], *shared)


def make_table(case: ScoreCase) -> jax.Array:
    """Returns a table of scattered pages; 0 past a length."""
    rng = np.random.default_rng(0)
    pages = iter(1 + rng.permutation(case.num_pages - 1))
    table = np.zeros((len(case.lengths), case.width), np.int32)
    for lane, length in enumerate(case.lengths):
        for column in range(-(-length // case.page_size)):
            table[lane, column] = next(pages)
    return jnp.asarray(table)


@functools.partial(jax.jit, static_argnums=0)
def make_codes(case: ScoreCase, key: jax.Array) -> jax.Array:
    """Returns random codes; channels differ in their ranges as those of models do."""
    _, codes, *_ = case.shapes
    keys = jax.random.split(key, 3)
    size, lead = case.head_size, codes.shape[:-1]
    scale = jnp.exp(jax.random.normal(keys[0], (codes.shape[1], 1, size)))
    step = scale * jax.random.uniform(keys[1], (*lead, size), minval=0.8) / 8
    low = -step * 1.5 * 2**case.bits
    bits = [
        jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
        for x in (low, step)
    ]
    ranges = bits[0].astype(jnp.uint32) | bits[1].astype(jnp.uint32) << 16
    words = jax.random.bits(keys[2], (*lead, codes.shape[-1] - size), jnp.uint32)
    words = jnp.concatenate([ranges, words], -1)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def num_bytes_read(case: ScoreCase) -> int:
    """Returns bytes that a call must move."""
    layout, total = case.layout, 0
    for length, budget in zip(case.lengths, case.budgets, strict=True):
        groups = -(-length // layout.group)
        total += groups * NUM_CHANNELS * 4 * (1 + layout.words)
        total += min(groups, SAMPLED_GROUPS) * 4 * layout.head_size
        total += 4 * min(budget, length)
    return total * case.num_heads


def compare(select, case: ScoreCase, q, codes, table, lengths, budgets) -> dict:
    """Returns the share of picks that the reference makes too, and the worst miss.

    A miss is how many ranks a key that is not picked lies above one that is: 1 and 0
    are roundings.
    """
    got = jax.jit(select)(q, codes, table, lengths, budgets)
    options = case.options
    expected = jax.jit(functools.partial(score_select, **options, impl="reference"))(
        q, codes, table, lengths, budgets
    )
    scale = case.head_size**-0.5

    @jax.jit
    def ranked(q, codes, table, lengths):
        scores = index_scores(q, codes, table, lengths, layout=case.layout, scale=scale)
        return ranks_of(scores)

    ranks = np.asarray(ranked(q, codes, table, lengths))
    same = total = worst = 0
    for lane, head in np.ndindex(*got.counts.shape):
        lists = [
            np.asarray(x.indices[lane, head, : int(x.counts[lane, head])])
            for x in (got, expected)
        ]
        same += len(np.intersect1d(*lists))
        total += len(lists[1])
        row = ranks[lane, head, : case.lengths[lane]]
        left = np.delete(row, lists[0])
        if len(left) and len(lists[0]):
            worst = max(worst, int(left.max() - row[lists[0]].min()))
    counts = bool((got.counts == expected.counts).all())
    return dict(same_picks=same / max(total, 1), worst_miss=worst, same_counts=counts)


def main() -> None:
    """Command line."""
    from pallas_kernels import bench as benches  # which imports this module

    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--impl", default=None, help="default: of this platform")
    parser.add_argument("--cases", nargs="*", choices=names, default=names)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--commit", default="unknown", help="recorded in the file")
    parser.add_argument("--layers", type=int, default=32, help="of a program")
    options = parser.parse_args()
    impl = options.impl or benches.default_impl()
    benches.run(options.cases, impl, options.commit, options.output, options.layers)


if __name__ == "__main__":
    main()
