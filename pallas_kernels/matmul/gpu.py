"""Product of many rows with a weight for Hopper GPUs, in Pallas Mosaic GPU.

As many CTAs as multiprocessors go through the tiles of the result, in an order fixed
before the launch (`gpu_schedule`). In each, one warpgroup copies steps of rows and
weight into shared memory, also those of the next tile while the last one is written;
two multiply, each its half of the tile in one accumulator that takes all inputs in
their order. A pair of CTAs with two tiles above each other reads the weight once, and
each sends the other its half. Copies past the last row give zeros and write nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import ManyRows, ProductRows, Weight
from pallas_kernels.gpu_layouts import interpreter_of
from pallas_kernels.matmul.gpu_schedule import (
    CHUNK,
    GROUPS,
    OUT_SLOTS,
    MatmulConfig,
    choose_config,
    make_table,
)

_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_ROW_GROUP = 8  # rows of one tile of shared memory: a copy ends at a multiple
_REGISTERS, _COPY_REGISTERS = 232, 40  # of a thread that multiplies, that copies


@functools.partial(jax.jit, static_argnames=("interpret", "config"))
def matmul_gpu(
    x: ManyRows,
    weight: Weight,
    *,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: MatmulConfig | None = None,
) -> ProductRows:
    """Returns what `api.matmul` documents, computed on a Hopper GPU."""
    num_rows, num_inputs = x.shape
    num_columns = weight.shape[1]
    config = config or choose_config(num_rows, num_columns, num_inputs)
    for name, size, unit in (
        ("inputs", num_inputs, config.depth),
        ("outputs", num_columns, CHUNK),
    ):
        if size % unit:
            raise NotImplementedError(
                f"the weight has {size} {name}: the GPU kernel takes multiples of "
                f"{unit}; impl='reference' serves every size"
            )
    table = make_table(num_rows, num_columns, config)
    num_out = -(-num_rows // _ROW_GROUP) * _ROW_GROUP, num_columns
    filling = 0
    if interpret:
        # Its copies know no edge, so rows and outputs go on as far as tiles do. What
        # lies there must not matter.
        rows, columns = (1 + n for n in config.tiles(num_rows, num_columns))
        num_out = rows * config.tile_rows, columns * config.tile_columns
        filling = jnp.nan
    x = _extend(x, num_out[0], 0, filling)
    weight = _extend(weight, num_out[1], 1, filling)
    out = _launch(table, x, weight, (num_rows, num_columns), config, interpret)
    return out[:num_rows, :num_columns]


def _extend(array, size, axis, filling):
    """Returns an array that goes on up to `size`, itself if it has it."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = 0, size - array.shape[axis]
    return (
        jnp.pad(array, padding, constant_values=filling) if padding[axis][1] else array
    )


def _launch(table, x, weight, used, config, interpret):
    """Returns the product; only tiles with something of the `used` shape are made."""
    num_ctas, cluster = table.shape[0], config.cluster

    def entry(table, x, weight, out, x_s, w_s, out_s, arrived, free):
        member = lax.axis_index("member")
        cta = lax.axis_index("pair") * cluster + member
        index = lax.axis_index("warpgroup")
        work = _Work(config, x.shape[1] // config.depth, table.at[cta])
        steps = _Steps(config, x_s, w_s, arrived, free)

        @pl.when(index < GROUPS)
        def _multiply():
            plgpu.set_max_registers(_REGISTERS, action="increase")
            _Multiplier(work, steps, index, used, out, out_s.at[index]).run()

        @pl.when(index == GROUPS)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            _Copier(work, steps, x, weight).run()

    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),
        grid=(num_ctas // cluster,),
        grid_names=("pair",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        kernel_name="matmul",
        scratch_types=_scratch(config, x.dtype),
        interpret=interpreter_of(interpret),
    )(jnp.asarray(table), x, weight)


def _scratch(config: MatmulConfig, dtype) -> list:
    """Returns the shared memory and the barriers of one CTA."""
    stages = config.num_stages
    return [
        plgpu.SMEM(
            (stages, config.tile_rows, config.depth), dtype, transforms=_SWIZZLED
        ),
        plgpu.SMEM(
            (stages, config.depth, config.tile_columns), dtype, transforms=_SWIZZLED
        ),
        plgpu.SMEM((GROUPS, OUT_SLOTS, CHUNK, CHUNK), dtype, transforms=_SWIZZLED),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        # A step that a pair shares is written into both only when both are done with
        # what was there.
        plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=GROUPS, num_barriers=stages
        )
        if config.cluster > 1
        else plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """What one CTA does."""

    config: MatmulConfig
    num_steps: int  # of a tile
    table: Any  # int32 [1 + tiles, 3], see `make_table`

    @property
    def num_tiles(self):
        """Number of tiles of this CTA."""
        return self.table[0, 0]

    def tile(self, index):
        """Returns (row of tiles, column of tiles, whether a pair shares rows)."""
        return tuple(self.table[1 + index, i] for i in range(3))


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """Steps of rows and weight in shared memory, in use one after the other."""

    config: MatmulConfig
    x_s: Any  # [stages, tile rows, depth]
    w_s: Any  # [stages, depth, tile columns]
    arrived: Any  # [stages], both are there
    free: Any  # [stages], all warpgroups that read them are done

    def behind(self, slot, distance=1):
        """Returns the slot `distance` steps on; backwards where it is negative."""
        stages = self.config.num_stages
        return lax.rem(slot + (distance + stages), stages)


@dataclasses.dataclass(frozen=True, eq=False)
class _Copier:
    """The warpgroup that copies steps into shared memory."""

    work: _Work
    steps: _Steps
    x: Any  # [T, in]
    weight: Any  # [in, out]

    def run(self):
        """Copies all steps of all tiles."""
        stages, num_steps = self.steps.config.num_stages, self.work.num_steps

        def copy_tile(index, slot):
            place = self.work.tile(index)

            def copy_step(step, slot):
                @pl.when(index * num_steps + step >= stages)
                def _wait():
                    plgpu.barrier_wait(self.steps.free.at[slot])

                self.copy_step(step, slot, *place)
                return self.steps.behind(slot)

            return lax.fori_loop(0, num_steps, copy_step, slot)

        def drain(_, slot):
            plgpu.barrier_wait(self.steps.free.at[slot])
            return self.steps.behind(slot)

        slot = lax.fori_loop(0, self.work.num_tiles, copy_tile, jnp.int32(0))
        # No CTA of a pair may end while the other one still tells it something.
        in_flight = jnp.minimum(self.work.num_tiles * num_steps, stages)
        lax.fori_loop(0, in_flight, drain, self.steps.behind(slot, -in_flight))

    def copy_step(self, step, slot, row, column, shares_rows):
        """Starts the two copies of a step; a pair of CTAs shares one of them."""
        config = self.steps.config
        inputs = pl.ds(step * config.depth, config.depth)
        rows = pl.ds(row * config.tile_rows, config.tile_rows)
        columns = pl.ds(column * config.tile_columns, config.tile_columns)

        def copy(x_axes, weight_axes):
            for source, target, axes in (
                (self.x.at[rows, inputs], self.steps.x_s, x_axes),
                (self.weight.at[inputs, columns], self.steps.w_s, weight_axes),
            ):
                bar = self.steps.arrived.at[slot]
                plgpu.copy_gmem_to_smem(
                    source, target.at[slot], bar, collective_axes=axes
                )

        if config.cluster == 1:
            return copy(None, None)

        @pl.when(shares_rows == 0)
        def _share_weight():
            copy(None, "member")

        @pl.when(shares_rows != 0)
        def _share_rows():
            copy("member", None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Multiplier:
    """One warpgroup that multiplies its half of every tile."""

    work: _Work
    steps: _Steps
    index: jax.Array  # among those of the CTA
    used: tuple[int, int]  # rows and outputs of the result
    out: Any  # [T, out]
    out_s: Any  # [slots, 64, 64]

    def run(self):
        """Makes all tiles."""

        def make_tile(index, carry):
            slot, (row, column, _) = carry
            config, shape = self.steps.config, self.steps.config.group_shape
            first = row * config.tile_rows, column * config.tile_columns
            along = (shape[0], 0) if config.by_rows else (0, shape[1])
            first = tuple(f + self.index * a for f, a in zip(first, along, strict=True))
            # Read long before it is needed.
            following = self.work.tile(jnp.minimum(index + 1, self.work.num_tiles - 1))
            is_used = (first[0] < self.used[0]) & (first[1] < self.used[1])

            @pl.when(is_used)
            def _make():
                self.store(self.multiply(slot), *first)

            @pl.when(jnp.logical_not(is_used))
            def _pass():
                self.pass_over(slot)

            return self.steps.behind(slot, self.work.num_steps), following

        start = jnp.int32(0), self.work.tile(0)
        lax.fori_loop(0, self.work.num_tiles, make_tile, start)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def multiply(self, slot):
        """Returns this half of a tile, float32."""
        rows, columns = self.steps.config.group_shape
        if self.steps.config.by_rows:
            part = pl.ds(self.index * rows, rows), slice(None)
        else:
            part = slice(None), pl.ds(self.index * columns, columns)

        def run(acc):
            def step(number, slot):
                plgpu.barrier_wait(self.steps.arrived.at[slot])
                x = self.steps.x_s.at[slot].at[part[0]]
                plgpu.wgmma(acc, x, self.steps.w_s.at[slot].at[:, part[1]])
                # The product before this one is done, and its step can be replaced.
                plgpu.wgmma_wait(1)

                @pl.when(number > 0)
                def _release():
                    plgpu.barrier_arrive(
                        self.steps.free.at[self.steps.behind(slot, -1)]
                    )

                return self.steps.behind(slot)

            end = lax.fori_loop(0, self.work.num_steps, step, slot)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.steps.free.at[self.steps.behind(end, -1)])
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC((rows, columns), jnp.float32))

    def pass_over(self, slot):
        """Frees the steps of a tile of which this warpgroup has nothing."""

        def step(_, slot):
            plgpu.barrier_wait(self.steps.arrived.at[slot])
            plgpu.barrier_arrive(self.steps.free.at[slot])
            return self.steps.behind(slot)

        lax.fori_loop(0, self.work.num_steps, step, slot)

    def store(self, acc, first_row, first_column):
        """Rounds sums and copies them to the result, a chunk after the other."""
        rows, columns = self.steps.config.group_shape
        rounded = acc.astype(self.out.dtype)
        places = [
            (r, c) for r in range(0, rows, CHUNK) for c in range(0, columns, CHUNK)
        ]
        for number, (row, column) in enumerate(places):
            place = self.out_s.at[number % OUT_SLOTS]
            # The last tile may have ended in the place that this one begins with.
            in_flight = OUT_SLOTS - 1 if number else 0
            plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
            place[...] = rounded[row : row + CHUNK, column : column + CHUNK]
            plgpu.commit_smem()
            window = pl.ds(first_row + row, CHUNK), pl.ds(first_column + column, CHUNK)
            plgpu.copy_smem_to_gmem(place, self.out.at[window])
