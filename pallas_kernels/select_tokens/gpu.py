"""Exact top-k selection for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per (lane, KV head). Its warpgroups hold the row as ordered 32-bit keys and
find the smallest chosen key by bisection over the bits, then (only where keys tie
there) the last chosen position by bisection over positions. Every thread owns
consecutive positions, so a prefix sum of its count gives the rank of its first one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref, nvvm, scf, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.select_tokens.api import SelectedTokens

_LARGEST, _SMALLEST = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min
_THREADS = 128  # of one warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Tunables of one launch."""

    num_warpgroups: int = 4
    per_thread: int = 16  # consecutive candidates of one thread, a multiple of 4

    @property
    def slab(self) -> int:
        """Candidates that the registers of a CTA hold at once."""
        return self.num_warpgroups * _THREADS * self.per_thread


def default_config(num_candidates: int) -> SelectConfig:
    """Returns the smallest configuration that holds a row in registers, if one does."""
    for config in (
        SelectConfig(num_warpgroups=1, per_thread=4),
        SelectConfig(num_warpgroups=2, per_thread=8),
        SelectConfig(num_warpgroups=4, per_thread=16),
        SelectConfig(num_warpgroups=8, per_thread=16),
    ):
        if config.slab >= num_candidates:
            return config
    return SelectConfig(num_warpgroups=8, per_thread=32)


def select_tokens_gpu(
    scores: jax.Array,
    lengths: jax.Array,
    budgets: jax.Array,
    *,
    cap: int,
    num_recent: int = 0,
    per_layer: bool = False,
    interpret: bool = False,
    config: SelectConfig | None = None,
) -> SelectedTokens:
    """Returns what `api.select_tokens` documents, computed on a Hopper GPU."""
    lanes, num_heads, num_candidates = scores.shape
    if per_layer:
        scores = functools.reduce(jnp.add, jnp.unstack(scores, axis=1))[:, None]
    config = config or default_config(num_candidates)
    padded = -(-num_candidates // config.slab) * config.slab
    if padded != num_candidates:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padded - num_candidates)))
    scores = scores.reshape(*scores.shape[:2], -1, config.per_thread)
    counts = jnp.minimum(jnp.minimum(budgets, lengths), cap)
    limits = jnp.stack([lengths, counts], axis=1)
    indices = _select(
        limits,
        scores,
        cap=cap,
        num_recent=num_recent,
        config=config,
        interpret=interpret,
    )
    return SelectedTokens(
        jnp.broadcast_to(indices, (lanes, num_heads, cap)),
        jnp.broadcast_to(counts[:, None], (lanes, num_heads)),
    )


def _select(limits, scores, *, cap, num_recent, config, interpret):
    lanes, rows, _, per_thread = scores.shape
    W = config.num_warpgroups
    num_slabs = scores.shape[2] // (W * _THREADS)
    # One row of the array per thread.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_THREADS, 4), (32, 4))),
        warp_dims=(-4,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    by_thread = layout.reduce(1)
    shape = (_THREADS, per_thread)

    def body(limit_ref, score_ref, out_ref, count_s, scan_s, bar):
        lane, row = lax.axis_index("lane"), lax.axis_index("row")
        wg = lax.axis_index("wg")
        length, wanted = limit_ref[lane, 0], limit_ref[lane, 1]
        recent = length - jnp.minimum(num_recent, wanted)

        def positions(slab):
            thread = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            element = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            first = (slab * W + wg) * (_THREADS * per_thread)
            return first + thread * per_thread + element

        def load_keys(slab):
            first = pl.multiple_of((slab * W + wg) * _THREADS, _THREADS)
            x = plgpu.load(
                score_ref.at[lane, row, pl.ds(first, _THREADS)],
                layout=layout,
                optimized=False,
            )
            position = positions(slab)
            bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
            key = jnp.where(bits < 0, bits ^ jnp.int32(_LARGEST), bits)
            key = jnp.where(position >= recent, jnp.int32(_LARGEST), key)
            return jnp.where(position < length, key, jnp.int32(_SMALLEST))

        kept = load_keys(jnp.int32(0)) if num_slabs == 1 else None

        def count_all(turn, is_counted):
            """Returns how many candidates of the whole row satisfy a predicate."""

            def count_slab(slab, total):
                key = load_keys(slab) if kept is None else kept
                hits = is_counted(key, positions(slab))
                return total + jnp.sum(jnp.where(hits, 1, 0).sum(axis=1))

            if kept is None:
                total = lax.fori_loop(0, num_slabs, count_slab, jnp.int32(0))
            else:
                total = count_slab(jnp.int32(0), jnp.int32(0))
            if W == 1:
                return total
            # Two sets in turn: a slow warpgroup may still read the last one.
            turn = lax.rem(turn, 2)
            count_s[turn, wg] = total
            plgpu.barrier_arrive(bar)
            plgpu.barrier_wait(bar)
            return sum(count_s[turn, w] for w in range(W))

        def halve_keys(carry):
            bit, low, at_low = carry
            # Setting a bit of the offset from the smallest key raises the key.
            middle = low + lax.shift_left(jnp.int32(1), 31 - bit)
            hits = count_all(bit, lambda key, _: key >= middle)
            enough = hits >= wanted
            low = jnp.where(enough, middle, low)
            return bit + 1, low, jnp.where(enough, hits, at_low)

        # The largest key that at least `wanted` candidates reach.
        bit, low, at_low = lax.while_loop(
            lambda c: (c[0] < 32) & (c[2] != wanted),
            halve_keys,
            (jnp.int32(0), jnp.int32(_SMALLEST), jnp.int32(_LARGEST)),
        )

        def last_position():
            """Returns the end of the positions whose candidates equal to `low` stay."""

            def halve(carry):
                turn, end, bit = carry
                middle = end + bit
                hits = count_all(
                    turn,
                    lambda key, position: (
                        (key > low) | ((key == low) & (position < middle))
                    ),
                )
                return turn + 1, jnp.where(hits <= wanted, middle, end), bit // 2

            top = 1 << (num_slabs * config.slab - 1).bit_length()
            return lax.while_loop(
                lambda c: c[2] > 0, halve, (bit, jnp.int32(0), jnp.int32(top))
            )[1]

        end = lax.cond(at_low == wanted, lambda: jnp.int32(_LARGEST), last_position)
        end = jnp.where(wanted == 0, 0, end)
        low = jnp.where(wanted == 0, _LARGEST, low)

        def write_slab(slab, base):
            key = load_keys(slab) if kept is None else kept
            position = positions(slab)
            chosen = (key > low) | ((key == low) & (position < end))
            chosen = jnp.where(chosen, 1, 0)
            count = chosen.sum(axis=1)
            scan = _warp_scan(count, by_thread, interpret)
            plgpu.barrier_arrive(bar)  # the sums of the slab before have been read
            plgpu.barrier_wait(bar)
            scan_s[wg] = scan
            plgpu.barrier_arrive(bar)
            plgpu.barrier_wait(bar)
            rank = scan - count
            thread = plgpu.broadcasted_iota(jnp.int32, (_THREADS,), 0, layout=by_thread)
            total = jnp.int32(0)
            for w in range(W):
                for warp in range(_THREADS // 32):
                    warp_total = scan_s[w, 32 * warp + 31]
                    total += warp_total
                    later = jnp.where(thread >= 32 * (warp + 1), warp_total, 0)
                    same = jnp.where(wg == w, 1, 0)
                    after = jnp.where(wg > w, warp_total, 0)
                    rank += later * same + after
            _append(out_ref.at[lane, row], rank + base, chosen, position, layout,
                    by_thread, interpret)  # fmt: skip
            return base + total

        lax.fori_loop(0, num_slabs, write_slab, jnp.int32(0))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((lanes, rows, cap), jnp.int32),
        grid=(lanes, rows),
        grid_names=("lane", "row"),
        num_threads=W,
        thread_name="wg",
        kernel_name="select_tokens",
        scratch_types=[
            plgpu.SMEM((2, max(W, 4)), jnp.int32),
            plgpu.SMEM((W, _THREADS), jnp.int32),
            plgpu.Barrier(num_arrivals=W),
        ],
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(limits, scores)


def _warp_scan(count, by_thread, interpret):
    """Returns the inclusive sums of one value per thread over the threads of a warp."""
    if interpret:
        return jnp.cumsum(count.reshape(-1, 32), axis=1).reshape(-1)

    @plgpu.inline_mgpu(
        arg_types=(by_thread,),
        return_type=plgpu.ShapeDtypeStruct((_THREADS,), jnp.int32, layout=by_thread),
    )
    def scan(ctx, x):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        x_type = x.registers.flat[0].type
        value = _element(x.registers.flat[0], 0)
        lane = arith.andi(mgpu.thread_idx(), mgpu.c(31, i32))
        for distance in (1, 2, 4, 8, 16):
            other = nvvm.shfl_sync(
                mgpu.c(0xFFFFFFFF, i32),
                value,
                mgpu.c(distance, i32),
                mgpu.c(0, i32),
                nvvm.ShflKind.up,
            )
            has_other = arith.cmpi(arith.CmpIPredicate.uge, lane, mgpu.c(distance, i32))
            other = arith.select(has_other, other, mgpu.c(0, i32))
            value = arith.addi(value, other)
        x.registers.flat[0] = vector.broadcast(x_type, value)
        return x

    return scan(count)


def _append(out_ref, rank, chosen, position, layout, by_thread, interpret):
    """Writes the chosen positions of every thread behind each other from its rank."""
    if interpret:
        rank = (rank[:, None] + jnp.cumsum(chosen, axis=1) - chosen).reshape(-1)
        chosen, position = chosen.reshape(-1), position.reshape(-1)

        def write(i, _):
            @pl.when(chosen[i] != 0)
            def _write():
                out_ref[rank[i]] = position[i]

        lax.fori_loop(0, chosen.shape[0], write, None)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), by_thread, layout, layout))
    def append(ctx, out, rank, chosen, position):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        at = _element(rank.registers.flat[0], 0)
        for bits, where in zip(
            chosen.registers.flat, position.registers.flat, strict=True
        ):
            for i in range(ir.VectorType(bits.type).shape[0]):
                is_chosen = _element(bits, i)
                store = scf.IfOp(
                    arith.cmpi(arith.CmpIPredicate.ne, is_chosen, mgpu.c(0, i32))
                )
                with ir.InsertionPoint(store.then_block):
                    index = arith.index_cast(ir.IndexType.get(), at)
                    memref.store(_element(where, i), out, [index])
                    scf.yield_([])
                at = arith.addi(at, is_chosen)

    append(out_ref, rank, chosen, position)


def _element(register, i):
    return vector.extract(
        register,
        dynamic_position=[],
        static_position=ir.DenseI64ArrayAttr.get([i]),
    )
