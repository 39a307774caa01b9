"""Exact top-k selection for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per (lane, KV head). Its warpgroups hold the row in registers and find the
smallest chosen score by bisection over the bits of ordered 32-bit keys. What the
registers cannot hold is read again for every bit, as far as the row has candidates.
Scores are compared and counted as floats, for which the chip has twice the units.
Every thread owns consecutive positions, so prefix sums over threads give the rank of
its first chosen position and the number of equal scores before it (of which the lowest
positions are chosen).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import PerLane, Scores
from pallas_kernels.gpu_counting import (
    THREADS,
    add_warp_sums,
    append_chosen,
    synchronize,
    warp_scan,
    write_warp_sums,
)
from pallas_kernels.gpu_layouts import interpreter_of
from pallas_kernels.select_tokens.api import SelectedTokens

_LARGEST, _SMALLEST = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Tunables of one launch."""

    num_warpgroups: int = 4
    per_thread: int = 16  # consecutive candidates of one thread, a multiple of 4
    again: int = 8  # of those read again, at a time; a multiple of 4

    @property
    def slab(self) -> int:
        """Candidates that the registers of a CTA hold, at most 32768."""
        return self.num_warpgroups * THREADS * self.per_thread

    @property
    def piece(self) -> int:
        """Candidates that a CTA reads again at a time."""
        return self.num_warpgroups * THREADS * self.again

    def pieces(self, num_candidates):
        """Returns how many pieces lie behind the slab."""
        return max(0, -(-(num_candidates - self.slab) // self.piece))


# Measured on one H100, see docs/kernels.md. Keys: the most candidates they serve.
TUNED = {
    512: SelectConfig(num_warpgroups=1, per_thread=4),
    2048: SelectConfig(num_warpgroups=2, per_thread=8),
}
_MOST_PER_THREAD = 64  # candidates that fit the registers


def choose_config(num_candidates: int) -> SelectConfig:
    """Returns the tuned configuration.

    Beyond 2048 candidates the row of a thread grows by 4, so that multiples of 2048
    need no padding; beyond 32768, multiples of 4096 need none.
    """
    for size, config in TUNED.items():
        if num_candidates <= size:
            return config
    per_thread = min(_MOST_PER_THREAD, 4 * -(-num_candidates // 2048))
    return SelectConfig(num_warpgroups=4, per_thread=per_thread)


# Compiled once for all layers of a model.
@functools.partial(
    jax.jit,
    static_argnames=("cap", "num_recent", "per_layer", "interpret", "config"),
)
def select_tokens_gpu(
    scores: Scores,
    lengths: PerLane,
    budgets: PerLane,
    *,
    cap: int,
    num_recent: int,
    per_layer: bool,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: SelectConfig | None = None,
) -> SelectedTokens:
    """Returns what `api.select_tokens` documents, computed on a Hopper GPU."""
    lanes, num_heads, num_candidates = scores.shape
    if per_layer:
        scores = functools.reduce(jnp.add, jnp.unstack(scores, axis=1))[:, None]
    config = config or choose_config(num_candidates)
    padded = config.slab + config.pieces(num_candidates) * config.piece
    if padded != num_candidates:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padded - num_candidates)))
    select = functools.partial(_select, cap=cap, num_recent=num_recent, config=config)
    indices, counts = select(scores, lengths, budgets, interpret=interpret)
    return SelectedTokens(
        jnp.broadcast_to(indices, (lanes, num_heads, cap)),
        jnp.broadcast_to(counts, (lanes, num_heads)),
    )


def _select(scores, lengths, budgets, *, cap, num_recent, config, interpret):
    """Returns indices [lanes, rows, cap] and counts [lanes, rows]."""
    lanes, rows, num_candidates = scores.shape
    W = config.num_warpgroups
    pieces = config.pieces(num_candidates)
    # One row of the arrays per thread.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((THREADS, 4), (32, 4))),
        warp_dims=(-4,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    by_thread = layout.reduce(1)
    widths = (config.per_thread, config.again) if pieces else (config.per_thread,)
    slab_rows = config.slab // config.again
    views = [scores.reshape(lanes, rows, -1, width) for width in widths]

    def body(*refs):
        view_refs, refs = refs[: len(views)], refs[len(views) :]
        length_ref, budget_ref, out_ref, count_ref, sums_s, scan_s, bar = refs
        lane, row = lax.axis_index("lane"), lax.axis_index("row")
        wg = lax.axis_index("wg")
        length = length_ref[lane]
        wanted = jnp.minimum(jnp.minimum(budget_ref[lane], length), cap)

        @pl.when(wg == 0)
        def _write_count():
            count_ref[lane, row] = wanted

        recent = length - jnp.minimum(num_recent, wanted)

        def load_scores(ref, first_row):
            """Returns the scores of a row of candidates for every thread."""
            per_thread = ref.shape[3]
            shape = (THREADS, per_thread)
            first_row = pl.multiple_of(first_row + wg * THREADS, THREADS)
            x = plgpu.load(
                ref.at[lane, row, pl.ds(first_row, THREADS)],
                layout=layout,
                optimized=False,
            )
            thread = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            element = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            position = first_row * per_thread + thread * per_thread + element
            x = jnp.where(position >= recent, jnp.inf, x)
            return jnp.where(position < length, x, -jnp.inf)

        def load_piece(piece):
            return load_scores(view_refs[1], slab_rows + piece * (W * THREADS))

        kept = load_scores(view_refs[0], 0)
        # No candidates lie behind the length.
        left = jnp.maximum(length - config.slab, 0)
        used = lax.div(left + (config.piece - 1), config.piece)

        def count(turn, is_counted):
            """Returns for how many candidates of the row a condition holds."""

            def add(total, x):
                return total + jnp.where(is_counted(x), 1.0, 0.0).sum(axis=1)

            total = plgpu.layout_cast(jnp.zeros((THREADS,), jnp.float32), by_thread)
            if pieces:
                total = lax.fori_loop(
                    0, used, lambda i, t: add(t, load_piece(i)), total
                )
            total = add(total, kept)
            total = total.astype(jnp.int32)
            # Two sets in turn: a slow warp may still read the last one.
            sums = sums_s.at[lax.rem(turn, 2)]
            write_warp_sums(sums, wg, total, by_thread, interpret)
            synchronize(bar, interpret)
            return add_warp_sums(sums, W, interpret)

        def halve(carry):
            bit, low, at_low = carry
            middle = low + lax.shift_left(jnp.int32(1), 31 - bit)
            smallest = _score_of(middle, by_thread)
            hits = count(bit, lambda x: x >= _repeat(smallest, x))
            enough = hits >= wanted
            low = jnp.where(enough, middle, low)
            return bit + 1, low, jnp.where(enough, hits, at_low)

        # The key of the largest score that at least `wanted` candidates reach.
        bit, low, _ = lax.while_loop(
            lambda carry: (carry[0] < 32) & (carry[2] != wanted),
            halve,
            (jnp.int32(0), jnp.int32(_SMALLEST), jnp.int32(_LARGEST)),
        )
        threshold = _score_of(low, by_thread)

        def before_thread(scan):
            """Returns sums over earlier threads of the CTA, and over all of them."""
            synchronize(bar, interpret)  # the sums before have been read
            scan_s[wg] = scan
            synchronize(bar, interpret)
            thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=by_thread)
            total = jnp.int32(0)
            for w in range(W):
                for warp in range(THREADS // 32):
                    warp_total = scan_s[w, 32 * warp + 31]
                    total += warp_total
                    is_later = jnp.where(thread >= 32 * (warp + 1), 1, 0)
                    is_same = jnp.where(wg == w, 1, 0)
                    scan += warp_total * (is_later * is_same + jnp.where(wg > w, 1, 0))
            return scan, total

        def write(x, first, carry):
            """Writes the chosen ones of consecutive candidates from `first` on."""
            larger, equal = carry  # candidates before them
            is_larger = jnp.where(x > _repeat(threshold, x), 1 << 16, 0)
            kind = is_larger + jnp.where(x == _repeat(threshold, x), 1, 0)
            # Both counts in one word: they are at most 2**15 candidates.
            both = kind.sum(axis=1)
            scan, total = before_thread(warp_scan(both, by_thread, interpret))
            scan -= both
            larger_before = larger + lax.shift_right_logical(scan, 16)
            equal_before = equal + (scan & 0xFFFF)
            thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=by_thread)
            first = first + (wg * THREADS + thread) * x.shape[1]
            row_ref = out_ref.at[lane, row]
            refs = (row_ref, larger_before, equal_before, first, kind)
            append_chosen(*refs, wanted - num_larger, layout, by_thread, interpret)
            total_larger = lax.shift_right_logical(total, 16)
            return larger + total_larger, equal + (total & 0xFFFF)

        def write_piece(piece, carry):
            first = config.slab + piece * config.piece
            return write(load_piece(piece), first, carry)

        # Rank of a chosen position: larger scores before it and chosen equal ones.
        num_larger = count(bit, lambda x: x > _repeat(threshold, x))
        carry = write(kept, 0, (jnp.int32(0), jnp.int32(0)))
        if pieces:
            lax.fori_loop(0, used, write_piece, carry)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((lanes, rows, cap), jnp.int32),
            jax.ShapeDtypeStruct((lanes, rows), jnp.int32),
        ),
        grid=(lanes, rows),
        grid_names=("lane", "row"),
        num_threads=W,
        thread_name="wg",
        kernel_name="select_tokens",
        scratch_types=[
            plgpu.SMEM((2, 32), jnp.int32),
            plgpu.SMEM((W, THREADS), jnp.int32),
            plgpu.Barrier(num_arrivals=W),
        ],
        interpret=interpreter_of(interpret),
    )(*views, lengths, budgets)


def _score_of(key, by_thread):
    """Returns the float whose place among all floats is `key`, NaN past infinity.

    It is repeated, one for each thread.
    """
    bits = jnp.where(key < 0, key ^ jnp.int32(_LARGEST), key)
    bits = plgpu.layout_cast(jnp.full((THREADS,), bits), by_thread)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _repeat(score, x):
    """Returns one score per thread in the shape of x [threads, candidates]."""
    return lax.broadcast_in_dim(score, x.shape, [0])
