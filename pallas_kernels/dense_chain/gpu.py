"""The dense work between two attentions for Hopper GPUs, in one launch.

As launches of their own, the products of few tokens leave the memory idle at every
start and end, for a fifth of their time. Here a fixed number of CTAs walks through all
of them. One warpgroup of each CTA copies weights into shared memory, ahead of time:
across the border of two products it goes on while the others wait for the rows of the
next one. Another copies rows, one to three compute, rows times weights, 64 rows each.
CTAs wait for each other between two products, by a counter in memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, scf
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.add_norm.gpu import add_norm_rows, wide_layout
from pallas_kernels.dense_chain.api import ChainWeights
from pallas_kernels.dense_chain.plan import (
    BLOCK,
    MAX_COLUMNS,
    NUM_CTAS,
    TILE,
    ChainPlan,
    Product,
    make_plan,
)
from pallas_kernels.gpu_layouts import interpreter_of

_SUM_COLUMNS = 32  # of sums that are stored at once
_SUB_TILES = 3  # weight tiles of 64 columns that a stage holds
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
    """One part of the chain, in the order of execution.

    A product takes `source` rows times `weights`; `targets` are parts [P, R, N], or
    gated rows where weights are gate and up [N, 2, I]. A norm (product is None) takes
    stream and parts `source` and a `weights` scale to a stream and normed rows.
    """

    product: Product | None
    source: tuple[Any, ...]
    weights: Any
    targets: tuple[Any, ...]

    @property
    def is_pair(self) -> bool:
        """Whether the weights are gate and up."""
        return len(self.weights.shape) == 3


@dataclasses.dataclass(frozen=True, eq=False)
class _Scratch:
    """Shared memory and barriers of a CTA."""

    weights: Any  # [stages, 3, 64, 64]
    pairs: Any  # [stages, 2, 64, columns], the same memory
    rows: Any  # [stages, tiles, 64, 64]
    pair_rows: Any  # the same memory, with the swizzle of `pairs`
    sums: Any  # float32 [stages, tiles, 64, 32], the same memory
    weights_bar: Any  # [stages], a block has arrived
    weights_free: Any  # [stages], all computing warpgroups are done with it
    rows_bar: Any
    rows_free: Any
    done_bar: Any  # this CTA's part of a stage is written
    go_bar: Any  # a norm may begin


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("eps", "interpret", "num_ctas"))
def dense_chain_gpu(
    mixed: jax.Array,
    stream: jax.Array,
    weights: ChainWeights,
    counters: jax.Array,
    *,
    eps: float,
    interpret: bool | plgpu.InterpretGPUParams = False,
    num_ctas: int = NUM_CTAS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `api.dense_chain` documents, computed on a Hopper GPU."""
    num_tokens, hidden = stream.shape
    inner = weights.down.shape[0]
    qkv = None if weights.qkv is None else weights.qkv.shape[1]
    plan = make_plan(num_tokens, mixed.shape[1], hidden, inner, qkv, num_ctas)
    if plan is None or stream.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"{num_tokens} tokens of {mixed.shape[1]}, {hidden}, {inner} and {qkv} "
            f"elements, {stream.dtype.name}: not among the sizes of the GPU kernel, "
            "see dense_chain.plan; impl='reference' serves every size"
        )
    buffers = _buffers(plan, inner)
    inputs = [mixed, stream, *(w for w in weights if w is not None)]
    counter_ref = jax.new_ref(counters)
    interpreter = interpreter_of(interpret)
    if interpreter is None:
        made = _launch(plan, eps, buffers)(*inputs, counter_ref)
    else:
        # Stages follow each other as launches: these CTAs cannot wait for each other.
        refs = [jax.new_ref(jnp.zeros(b.shape, b.dtype)) for b in buffers]
        for number in range(len(plan.products) + 2):
            launch = _launch(plan, eps, (), only=number, interpreter=interpreter)
            launch(*inputs, counter_ref, *refs)
        made = [jax.freeze(ref) for ref in refs]
    return made[0], made[-1], jax.freeze(counter_ref)


def _buffers(plan: ChainPlan, inner: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the types of what the launch writes, results first and last."""
    rows, hidden = plan.num_rows, plan.hidden

    def parts(product):
        columns = product.column_items * product.columns
        shape = product.splits, plan.num_tokens, columns
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    stream = jax.ShapeDtypeStruct((plan.num_tokens, hidden), jnp.bfloat16)
    gated = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16)
    buffers = stream, parts(plan.out), stream, stream, gated, parts(plan.down), stream
    return buffers if plan.qkv is None else (*buffers, parts(plan.qkv))


def _stages(plan: ChainPlan, inputs, buffers) -> list[_Stage]:
    """Returns the stages of a launch over references of its arrays."""
    mixed, stream, out, norm, gate_up, down, next_norm, *qkv = inputs
    result, out_parts, added, normed, gated, down_parts, last, *qkv_parts = buffers
    stages = [
        _Stage(plan.out, (mixed,), out, (out_parts,)),
        _Stage(None, (stream, out_parts), norm, (added, normed)),
        _Stage(plan.gate_up, (normed,), gate_up, (gated,)),
        _Stage(plan.down, (gated,), down, (down_parts,)),
        _Stage(None, (added, down_parts), next_norm, (result, last)),
    ]
    if qkv:
        stages.append(_Stage(plan.qkv, (last,), *qkv, tuple(qkv_parts)))
    return stages


def _launch(plan: ChainPlan, eps, out_type, *, only=None, interpreter=None):
    """Returns the launch, of one stage if `only` is its number."""
    num_inputs = 7 + (plan.qkv is not None)
    num_buffers = num_inputs

    def body(*refs):
        inputs, counter, rest = (
            refs[:num_inputs],
            refs[num_inputs],
            refs[num_inputs + 1 :],
        )
        stages = _stages(plan, inputs, rest[:num_buffers])
        if only is not None:
            stages = [stages[only]]
        weights, rows, *bars = rest[num_buffers:]
        cta = _Cta(
            plan, stages, eps, counter, _Scratch(*weights, *rows, *bars), interpreter
        )
        index = lax.axis_index("warpgroup")

        @pl.when(index < plan.consumers)
        def _compute():
            plgpu.set_max_registers(plan.registers, action="increase")
            cta.compute(index)

        @pl.when(index == plan.consumers)
        def _copy_weights():
            plgpu.set_max_registers(plan.copy_registers, action="decrease")
            cta.copy_weights()

        @pl.when(index > plan.consumers)
        def _copy_rows():
            plgpu.set_max_registers(plan.copy_registers, action="decrease")
            cta.copy_rows()

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=plan.consumers + 2,
        thread_name="warpgroup",
        kernel_name="dense_chain",
        scratch_types=_scratch(plan),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter,
    )


def _scratch(plan: ChainPlan) -> list:
    """Returns the shared memory and the barriers of one CTA."""
    columns = plan.gate_up.tile_columns
    swizzle = next(n for n in (64, 32, 16) if columns % n == 0)
    pairs = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(2 * swizzle))
    bf16, stages = jnp.bfloat16, plan.weight_stages

    def memory(*shape, transforms=_SWIZZLED):
        return plgpu.SMEM(shape, bf16, transforms=transforms)

    def bars(arrivals, number=()):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    return [
        plgpu.RefUnion(
            memory(stages, _SUB_TILES, BLOCK, MAX_COLUMNS // _SUB_TILES),
            memory(stages, 2, BLOCK, columns, transforms=pairs),
        ),
        plgpu.RefUnion(
            memory(plan.row_stages, plan.row_tiles, TILE, BLOCK),
            memory(plan.row_stages, plan.row_tiles, TILE, BLOCK, transforms=pairs),
            plgpu.SMEM(
                (plan.row_stages, plan.row_tiles, TILE, _SUM_COLUMNS),
                jnp.float32,
                transforms=(
                    plgpu.TilingTransform((8, _SUM_COLUMNS)),
                    plgpu.SwizzleTransform(128),
                ),
            ),
        ),
        bars(_SUB_TILES, stages),
        bars(plan.consumers, stages),
        bars(plan.row_tiles, plan.row_stages),
        bars(plan.consumers, plan.row_stages),
        bars(plan.consumers),
        bars(1),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Cta:
    """The work of one CTA."""

    plan: ChainPlan
    stages: list[_Stage]
    eps: float
    counter: Any
    scratch: _Scratch
    interpreter: plgpu.InterpretGPUParams | None

    @property
    def index(self):
        """Number of this CTA."""
        return lax.axis_index("cta")

    def item(self, product):
        """Returns column item, cut and blocks of this CTA, none beyond the items."""
        blocks = jnp.where(self.index < product.items, product.blocks, 0)
        columns = lax.rem(self.index, product.column_items)
        return columns, lax.div(self.index, product.column_items), blocks

    def copy_weights(self):
        """Copies the weights of all products, as soon as there is room."""
        scratch, number = self.scratch, jnp.int32(0)
        for stage in self.stages:
            if stage.product is None:
                continue

            def copy(block, number, stage=stage):
                slot = lax.rem(number, self.plan.weight_stages)

                @pl.when(number >= self.plan.weight_stages)
                def _wait():
                    plgpu.barrier_wait(scratch.weights_free.at[slot])

                self.copy_block(stage, block, slot)
                return number + 1

            blocks = self.item(stage.product)[2]
            number = lax.fori_loop(0, blocks, copy, number)
        _drain(scratch.weights_free, self.plan.weight_stages, number)

    def weight_tiles(self, stage, block):
        """Returns the tiles of one block of weights."""
        product, size = stage.product, stage.product.tile_columns
        column_item, split, _ = self.item(product)
        row = pl.multiple_of((split * product.blocks + block) * BLOCK, BLOCK)
        rows, tiles = pl.ds(row, BLOCK), []
        for tile in range(product.tiles):
            if stage.is_pair:
                columns = pl.ds(pl.multiple_of(column_item * size, size), size)
                tiles.append(stage.weights.at[rows, tile, columns])
            else:
                first = column_item * product.columns + tile * size
                columns = pl.ds(pl.multiple_of(first, size), size)
                tiles.append(stage.weights.at[rows, columns])
        return tiles

    def copy_block(self, stage, block, slot):
        """Starts the copies of one block of weights."""
        scratch = self.scratch
        target = scratch.pairs if stage.is_pair else scratch.weights
        tiles = self.weight_tiles(stage, block)
        for tile, source in enumerate(tiles):
            plgpu.copy_gmem_to_smem(
                source, target.at[slot, tile], scratch.weights_bar.at[slot]
            )
        for _ in range(_SUB_TILES - len(tiles)):
            plgpu.barrier_arrive(scratch.weights_bar.at[slot])

    def copy_rows(self):
        """Copies the rows of every product, once all CTAs have written them."""
        scratch, number = self.scratch, jnp.int32(0)
        for order, stage in enumerate(self.stages):
            if order:
                plgpu.barrier_wait(scratch.done_bar)
                _wait_for_all(self.counter, self.plan.num_ctas)
            if stage.product is None:
                plgpu.barrier_arrive(scratch.go_bar)
                continue
            _, split, blocks = self.item(stage.product)
            first = split * stage.product.blocks
            rows_s = scratch.pair_rows if stage.is_pair else scratch.rows

            def copy(block, number, stage=stage, first=first, rows_s=rows_s):
                slot = lax.rem(number, self.plan.row_stages)

                @pl.when(number >= self.plan.row_stages)
                def _wait():
                    plgpu.barrier_wait(scratch.rows_free.at[slot])

                column = pl.multiple_of((first + block) * BLOCK, BLOCK)
                for tile in range(self.plan.row_tiles):
                    start = tile * TILE
                    size = min(TILE, self.plan.num_tokens - start)
                    plgpu.copy_gmem_to_smem(
                        stage.source[0].at[pl.ds(start, size), pl.ds(column, BLOCK)],
                        rows_s.at[slot, tile, pl.ds(0, size)],
                        scratch.rows_bar.at[slot],
                    )
                return number + 1

            number = lax.fori_loop(0, blocks, copy, number)
        _drain(scratch.rows_free, self.plan.row_stages, number)

    def compute(self, index):
        """Does the part of one computing warpgroup in every stage."""
        number = jnp.int32(0)
        for order, stage in enumerate(self.stages):
            if stage.product is None:
                plgpu.barrier_wait(self.scratch.go_bar)
                pl.when(index == 0)(functools.partial(self.norm, stage))
            else:
                number = self.multiply(stage, index, number)
            if order + 1 < len(self.stages):
                _publish(self.interpreter)
                plgpu.barrier_arrive(self.scratch.done_bar)

    def norm(self, stage):
        """Adds and norms some tokens."""
        refs = (*stage.source, stage.weights, *stage.targets)
        layout = wide_layout(8)

        def norm(i, _):
            add_norm_rows(
                refs, self.index + i * self.plan.num_ctas, 1, layout, self.eps
            )

        left = self.plan.num_tokens - self.index + self.plan.num_ctas - 1
        lax.fori_loop(0, lax.div(left, self.plan.num_ctas), norm, None)

    def multiply(self, stage, index, number):
        """Multiplies and writes the rows of a warpgroup; the blocks so far."""
        product, scratch = stage.product, self.scratch
        weights, all_rows = scratch.weights, scratch.rows
        if stage.is_pair:
            weights, all_rows = scratch.pairs, scratch.pair_rows
        column_item, split, blocks = self.item(product)
        places = [
            (row, tile)
            for row in range(self.plan.tiles_each)
            for tile in range(product.tiles)
        ]
        first_tile = index * self.plan.tiles_each

        def release(number):
            before = number - 1
            slot = lax.rem(before, self.plan.weight_stages)
            plgpu.barrier_arrive(scratch.weights_free.at[slot])
            slot = lax.rem(before, self.plan.row_stages)
            plgpu.barrier_arrive(scratch.rows_free.at[slot])

        def run(*sums):
            def step(block, number):
                slot = lax.rem(number, self.plan.weight_stages)
                row_slot = lax.rem(number, self.plan.row_stages)
                plgpu.barrier_wait(scratch.weights_bar.at[slot])
                plgpu.barrier_wait(scratch.rows_bar.at[row_slot])
                for total, (row, tile) in zip(sums, places, strict=True):
                    rows = all_rows.at[row_slot, first_tile + row]
                    plgpu.wgmma(total, rows, weights.at[slot, tile])
                plgpu.wgmma_wait(len(sums))  # the block before is done
                pl.when(block > 0)(functools.partial(release, number))
                return number + 1

            number_now = lax.fori_loop(0, blocks, step, number)
            return number_now, [total[...] for total in sums]

        shape = TILE, product.tile_columns
        number, sums = pl.run_scoped(
            run, *[plgpu.ACC(shape, jnp.float32)] * len(places)
        )

        @pl.when(blocks > 0)
        def _write():
            release(number)
            for row in range(self.plan.tiles_each):
                mine = [
                    x for x, place in zip(sums, places, strict=True) if place[0] == row
                ]
                self.write(stage, mine, first_tile + row, column_item, split)

        return number

    def write(self, stage, sums, tile, column_item, split):
        """Writes the sums of a tile of tokens: parts, or gated rows."""
        (target,), product = stage.targets, stage.product
        rows = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        if stage.is_pair:
            size = product.tile_columns
            columns = pl.ds(pl.multiple_of(column_item * size, size), size)
            target[rows, columns] = _gate(*sums)
            return
        # By way of the rows' memory, which is free until all have written.
        stages = self.plan.row_stages
        pieces = [
            total[:, start : start + _SUM_COLUMNS]
            for total in sums
            for start in range(0, product.tile_columns, _SUM_COLUMNS)
        ]
        for number, piece in enumerate(pieces):
            if number >= stages:
                plgpu.wait_smem_to_gmem(stages - 1, wait_read_only=True)
            place = self.scratch.sums.at[number % stages, tile]
            place[...] = piece
            plgpu.commit_smem()
            first = column_item * product.columns + number * _SUM_COLUMNS
            columns = pl.ds(pl.multiple_of(first, _SUM_COLUMNS), _SUM_COLUMNS)
            plgpu.copy_smem_to_gmem(place, target.at[split, rows, columns])
        plgpu.wait_smem_to_gmem(0)


def _drain(free, stages, number):
    """Waits until the last of `number` blocks are done with."""

    def wait(block, _):
        plgpu.barrier_wait(free.at[lax.rem(block, stages)])

    lax.fori_loop(jnp.maximum(number - stages, 0), number, wait, None)


def _gate(gate, up):
    """Returns silu(gate) * up in bfloat16, of both as rounded to it."""
    gate, up = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (gate, up))
    return (gate / (1.0 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)


def _publish(interpreter):
    """Makes what a thread has written visible to copies that other CTAs start."""
    if interpreter is not None:
        return

    @plgpu.inline_mgpu()
    def fence(ctx):
        del ctx
        mgpu.utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    fence()


def _wait_for_all(counter, num_ctas):
    """Waits until all CTAs have come here as often as this one.

    The counter is never cleared: what it was tells how often all have come. What
    they wrote before is visible to this CTA after it, to its copies as well.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(ctx, counter):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        ptr, count = mgpu.utils.memref_ptr(counter), mgpu.c(num_ctas, i32)
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            before = mgpu.utils.inline_ptx(
                "atom.add.acq_rel.gpu.global.u32 $0, [$1], 1;",
                ptr,
                result_types=i32,
                has_side_effects=True,
            )
            rounds = arith.addi(arith.divui(before, count), mgpu.c(1, i32))
            target = arith.muli(rounds, count)
            loop = scf.WhileOp([], [])
            with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
                now = mgpu.utils.inline_ptx(
                    "ld.acquire.gpu.global.b32 $0, [$1];",
                    ptr,
                    result_types=i32,
                    has_side_effects=True,
                )
                is_early = arith.cmpi(arith.CmpIPredicate.ult, now, target)
                scf.condition(is_early, [])
            with ir.InsertionPoint.at_block_begin(loop.after.blocks.append()):
                scf.yield_([])
            mgpu.utils.inline_ptx("fence.proxy.async;", has_side_effects=True)
        mgpu.utils.warpgroup_barrier()

    wait(counter)
