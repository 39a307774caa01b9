"""Product of few rows with a weight in 8 bits for Hopper GPUs, in Pallas Mosaic GPU.

Tokens are the columns of the matrix unit, which takes weights as its left operand from
registers, where they are widened to bfloat16. A warpgroup has 64 outputs; what it
multiplies at once, 64 outputs by 128 inputs, lies together in memory, in the order in
which its threads take it (`pack_gpu`). One more warpgroup of each CTA copies weights
and rows into shared memory, some steps ahead. Inputs may be cut over CTAs, whose sums
are left to the kernel behind. Copies past the last input give zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import FewRows, Int8Blocks, OutputScale, ProductParts
from pallas_kernels.gpu_layouts import WGMMA, WGMMA_ROWS, interpreter_of
from pallas_kernels.int8_matmul.tiling import (
    BLOCK,
    BLOCK_SHAPE,
    COPY_REGISTERS,
    ROW_UNIT,
    Tiling,
    choose_tiling,
    num_blocks,
    padded_rows,
)
from pallas_kernels.int8_matmul.weights import Int8Weight, PackedWeight

_OUTPUTS, _DEPTH = BLOCK
_PACKED = plgpu.Layout.WG_STRIDED(BLOCK_SHAPE, vec_size=16)

# Of a block: what a thread's place and the order of its bytes are made of, outputs |
# inputs, and how they lie in memory.
_SIZES = dict(
    warp=4, half=2, row=8, block=2, group=4, side=2, column=4, pair=2
)  # fmt: skip
_PLAIN = "warp half row block group side column pair".split()
_IN_MEMORY = "block half warp row column group side pair".split()


def pack_gpu(weight: Int8Weight, *, interpret: bool = False) -> PackedWeight:
    """Returns what `api.pack` documents: blocks in the order of threads.

    Of 64 outputs by 16 inputs the matrix unit wants of thread 32 w + 4 r + c the rows
    16 w + r and that + 8, and of both the inputs 2c, 2c + 1, 8 + 2c and 9 + 2c. Here a
    thread finds those of 64 inputs of one row as 16 neighbours, first of one row, then
    of the other, then the same of the next 64 inputs; threads lie behind each other.
    Inputs are filled up with zeros to whole blocks.
    """
    del interpret
    size_out, size_in = weight.values.shape
    for name, size in (("inputs", size_in), ("outputs", size_out)):
        if size % _OUTPUTS:
            raise NotImplementedError(
                f"the weight has {size} {name}: the GPU kernel takes multiples of "
                f"{_OUTPUTS}; impl='reference' serves every size"
            )
    tiles, steps = num_blocks(size_in, size_out)
    values = jnp.pad(weight.values, ((0, 0), (0, steps * _DEPTH - size_in)))
    sizes = _SIZES | dict(tile=tiles, step=steps)
    names = ["tile", *_PLAIN[:3], "step", *_PLAIN[3:]]
    order = ["tile", "step", *_IN_MEMORY]
    turned = values.reshape([sizes[name] for name in names]).transpose(
        [names.index(name) for name in order]
    )
    return PackedWeight(turned.reshape(tiles, steps, *BLOCK_SHAPE), weight.scale)


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("parts", "interpret", "tiling"))
def int8_matmul_gpu(
    x: FewRows,
    values: Int8Blocks,
    scale: OutputScale,
    *,
    parts: int | None = None,
    interpret: bool | plgpu.InterpretGPUParams = False,
    tiling: Tiling | None = None,
) -> ProductParts:
    """Returns what `api.int8_matmul` documents, computed on a Hopper GPU.

    Raises:
      NotImplementedError: sizes that the kernel, or the given tiling, cannot serve.
      ValueError: a tiling of another number of parts.
    """
    (num_rows, size_in), size_out = x.shape, len(scale)
    tiling = tiling or choose_tiling(num_rows, size_in, size_out, parts or 1)
    if tiling.parts != (parts or 1):
        raise ValueError(f"{tiling} does not make parts={parts}")
    reason = tiling.why_not(num_rows, size_in, size_out)
    if reason:
        raise NotImplementedError(f"{reason} in the GPU kernel")
    spec = _Spec(
        tiling=tiling,
        num_rows=padded_rows(num_rows),
        num_tiles=values.shape[0],
        num_steps=values.shape[1] // tiling.parts,
        dtype=jnp.dtype(x.dtype if parts is None else jnp.float32),
        interpreter=interpreter_of(interpret),
    )
    # What lies in rows behind the last one must not matter.
    filling = jnp.nan if interpret else 0
    missing = spec.num_rows - num_rows
    if missing:
        x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=filling)
    if interpret:  # whose copies know no edge
        x = jnp.pad(x, ((0, 0), (0, values.shape[1] * _DEPTH - size_in)))
    made = _launch(spec, x, values, scale)
    if missing:
        made = made[:, :num_rows]
    return made[0] if parts is None else made


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """Sizes of a launch."""

    tiling: Tiling
    num_rows: int  # multiple of 8
    num_tiles: int  # of 64 outputs
    num_steps: int  # of 128 inputs, of a part
    dtype: Any  # of the result
    interpreter: plgpu.InterpretGPUParams | None

    @property
    def stages(self):
        """Steps in shared memory."""
        return self.tiling.stages(self.num_rows)

    @property
    def chunk(self):
        """Rows that leave a warpgroup at once: as many as its weights had room for."""
        return self.stages * _DEPTH // self.dtype.itemsize


def _launch(spec: _Spec, x, values, scale):
    """Returns parts [P, T, out] of the product."""
    groups, registers = spec.tiling.groups, spec.tiling.registers

    def entry(x, values, scale, out, shared, x_s, scale_s, full, free, scaled, wide_s):
        values_s, out_s = shared
        index = lax.axis_index("warpgroup")
        steps = _Steps(spec, values_s, x_s, scale_s, full, free, scaled)
        first_tile = lax.axis_index("tile") * groups

        @pl.when(index == groups)
        def _copy():
            if registers:
                plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            _copy_steps(steps, x, values, scale, first_tile)

        @pl.when(index < groups)
        def _multiply():
            if registers:
                plgpu.set_max_registers(registers, action="increase")
            wide = wide_s.at[index] if spec.interpreter else None
            _Multiplier(spec, steps, index, wide).run(
                first_tile + index, out, out_s.at[index]
            )

    shape = spec.tiling.parts, spec.num_rows, spec.num_tiles * _OUTPUTS
    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct(shape, spec.dtype),
        grid=(-(-spec.num_tiles // groups), spec.tiling.parts),
        grid_names=("tile", "part"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        kernel_name="int8_matmul",
        scratch_types=_scratch(spec, x.dtype),
        interpret=spec.interpreter,
    )(x, values, scale)


def _swizzled(itemsize):
    """Shared memory that the matrix unit and copies read without conflicts."""
    return (
        plgpu.TilingTransform((ROW_UNIT, 128 // itemsize)),
        plgpu.SwizzleTransform(128),
    )


def _scratch(spec: _Spec, x_dtype) -> list:
    """Returns shared memory and barriers of a CTA; a warpgroup has its own weights.

    Its results take the place of them when none are left. The interpreter takes any
    two warpgroups that do so for a race, and multiplies shared memory only.
    """
    groups, stages = spec.tiling.groups, spec.stages
    values = plgpu.SMEM((groups, stages, *BLOCK_SHAPE), jnp.int8)
    results = plgpu.SMEM(
        (groups, spec.chunk, _OUTPUTS),
        spec.dtype,
        transforms=_swizzled(spec.dtype.itemsize),
    )
    interpreted = spec.interpreter is not None
    return [
        (values, results) if interpreted else plgpu.RefUnion(values, results),
        plgpu.SMEM((stages, spec.num_rows, _DEPTH), x_dtype, transforms=_swizzled(2)),
        plgpu.SMEM((groups, _OUTPUTS), jnp.float32),
        plgpu.Barrier(num_arrivals=1 + groups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups),
        plgpu.SMEM((groups, *BLOCK), x_dtype) if interpreted else None,
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """Steps of weights and rows in shared memory, in use one after the other."""

    spec: _Spec
    values_s: Any  # [groups, stages, 32, 256]
    x_s: Any  # [stages, T, 128]
    scale_s: Any  # [groups, 64]
    full: Any  # [stages], all copies of a step are there
    free: Any  # [stages], all warpgroups are done with a step
    scaled: Any  # all scales are there

    def slot(self, step):
        """Returns where a step lies."""
        return lax.rem(step, self.spec.stages)


def _copy_steps(steps: _Steps, x, values, scale, first_tile):
    """Copies scales and all steps of a CTA, and waits until steps have been used."""
    spec, part = steps.spec, lax.axis_index("part")
    count, stages = spec.num_steps, spec.stages
    # A warpgroup behind the last outputs makes them once more, for nobody.
    tiles = [
        jnp.minimum(first_tile + i, spec.num_tiles - 1)
        for i in range(spec.tiling.groups)
    ]

    def copy(step, _):
        slot = steps.slot(step)

        @pl.when(step >= stages)
        def _wait():
            plgpu.barrier_wait(steps.free.at[slot])

        step, bar = part * count + step, steps.full.at[slot]
        for i, tile in enumerate(tiles):
            place = steps.values_s.at[i, slot]
            plgpu.copy_gmem_to_smem(values.at[tile, step], place, bar)
        inputs = pl.ds(pl.multiple_of(step * _DEPTH, _DEPTH), _DEPTH)
        plgpu.copy_gmem_to_smem(x.at[:, inputs], steps.x_s.at[slot], bar)

    def drain(step, _):
        plgpu.barrier_wait(steps.free.at[steps.slot(step)])

    for i, tile in enumerate(tiles):
        outputs = pl.ds(pl.multiple_of(tile * _OUTPUTS, _OUTPUTS), _OUTPUTS)
        place = steps.scale_s.at[i]
        plgpu.copy_gmem_to_smem(scale.at[outputs], place, steps.scaled)
    lax.fori_loop(0, count, copy, None)
    lax.fori_loop(max(count - stages, 0), count, drain, None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Multiplier:
    """One warpgroup that makes 64 outputs of a part."""

    spec: _Spec
    steps: _Steps
    index: jax.Array  # among those of the CTA
    wide_s: Any  # [64, 128], or None

    def run(self, tile, out, out_s):
        """Makes the outputs of a tile and stores them."""
        spec = self.spec
        sums = self.multiply()
        plgpu.barrier_wait(self.steps.scaled)

        @pl.when(tile < spec.num_tiles)
        def _store():
            scale = self.steps.scale_s.at[self.index]
            factor = plgpu.load(scale, layout=WGMMA_ROWS, optimized=False)
            scaled = sums * lax.broadcast_in_dim(factor, sums.shape, [0])
            start = pl.multiple_of(tile * _OUTPUTS, _OUTPUTS)
            place = out.at[lax.axis_index("part"), :, pl.ds(start, _OUTPUTS)]
            self.store(scaled.astype(spec.dtype), place, out_s)

    def multiply(self):
        """Returns sums over the inputs, float32 [64, T]."""
        count, turn = self.spec.num_steps, self.spec.tiling.turn
        last = count % turn or turn

        def run(sums):
            def one(number, packed):
                return self.make_turn(sums, number * turn, turn, packed)

            turns = (count - last) // turn
            packed = lax.fori_loop(0, turns, one, self.load(jnp.int32(0)))
            self.make_turn(sums, jnp.int32(count - last), last, packed, is_last=True)
            return sums[...]

        return pl.run_scoped(
            run, plgpu.ACC((_OUTPUTS, self.spec.num_rows), jnp.float32)
        )

    def make_turn(self, sums, first, count, packed, *, is_last=False):
        """Adds the products of some steps; returns the weights of the step behind.

        While a step is multiplied the next one is loaded, and widened too if it is of
        the same turn: what a loop carries in the registers of a product would make
        every product wait (ptxas, C7513).
        """
        for step in range(count):
            slot = self.steps.slot(first + step)
            weights = self.widen(packed)
            plgpu.wgmma(sums, weights, self.steps.x_s.at[slot].T)
            if step:
                plgpu.wgmma_wait(1)
                self.release(first + step - 1)
            if not is_last or step + 1 < count:
                packed = self.load(first + step + 1)
        plgpu.wgmma_wait(0)
        self.release(first + count - 1)
        return packed

    def release(self, step):
        """Says that this warpgroup is done with a step."""
        plgpu.barrier_arrive(self.steps.free.at[self.steps.slot(step)])

    def load(self, step):
        """Waits for a step and returns its packed weights."""
        slot = self.steps.slot(step)
        plgpu.barrier_wait(self.steps.full.at[slot])
        return plgpu.load(self.steps.values_s.at[self.index, slot], layout=_PACKED)

    def widen(self, packed):
        """Returns packed weights as bfloat16, where the matrix unit takes them."""
        if self.wide_s is None:
            return _widen(packed)
        self.wide_s[...] = _unpacked(packed).astype(jnp.bfloat16)
        plgpu.commit_smem()
        return self.wide_s

    def store(self, results, out, out_s):
        """Copies results [64, T] to their place, some rows at a time."""
        spec = self.spec
        for first in range(0, spec.num_rows, spec.chunk):
            count = min(spec.chunk, spec.num_rows - first)
            if first:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            place = out_s.at[pl.ds(0, count)]
            some = results[:, first : first + count]
            place.T[...] = plgpu.layout_cast(some, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, out.at[pl.ds(first, count)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _unpacked(packed):
    """Returns a packed block as [64 outputs, 128 inputs]; what `_widen` does."""
    block = packed.reshape([_SIZES[name] for name in _IN_MEMORY])
    return block.transpose([_IN_MEMORY.index(name) for name in _PLAIN]).reshape(BLOCK)


@plgpu.inline_mgpu(
    arg_types=(_PACKED,),
    return_type=plgpu.ShapeDtypeStruct(BLOCK, jnp.bfloat16, layout=WGMMA),
)
def _widen(ctx, packed):
    """A packed block as bfloat16, in the registers where products take it.

    Exact, by four instructions for two values: the seven low bits make 128 and more,
    the highest one 128 or 256, and their difference is the value.
    """
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    words, one_word = (ir.VectorType.get((n,), i32) for n in (4, 1))
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    layout = mgpu.WGMMA_LAYOUT
    made = np.empty(layout.registers_shape(BLOCK), dtype=object)
    for number, register in enumerate(packed.registers.flat):
        block, half = divmod(number, 2)
        loaded = vector.bitcast(words, register)
        for group in range(4):
            word = vector.extract(loaded, [], [group])
            for side in range(2):
                two = vector.broadcast(one_word, _two_values(word, side))
                column = 8 * block + 2 * group + side
                made[0, column, 0, 0, half] = vector.bitcast(pair, two)
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)


def _two_values(word, side):
    """Two of the four bytes of a word, as bfloat16 in one register."""
    i32 = ir.IntegerType.get_signless(32)
    places = ("0x4140", "0x4342")[side]
    return llvm.inline_asm(
        i32,
        [word],
        f"""
        {{
        .reg .b32 s<3>;
        prmt.b32 s0, $1, 0x43, {places};
        and.b32 s1, s0, 0xff7fff7f;
        and.b32 s2, s0, 0xff80ff80;
        sub.bf16x2 $0, s1, s2;
        }}
        """,
        "=r,r",
    )
