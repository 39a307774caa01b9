"""Products of a few tokens with 8-bit weights: a kernel for Hopper GPUs, and XLA's.

Weights are int8 with one scale per output, x is [tokens, in] in bfloat16 and stays so:
weights are widened in registers, where the matrix unit takes them as its left operand,
so tokens are its columns. They are packed: what a warpgroup multiplies at once, 64
outputs by 128 inputs, lies together in the order in which threads take it. One more
warpgroup of each CTA copies weights and tokens into shared memory. `parts` cuts the
long axis over CTAs; their sums are left to the kernel behind, as the transformer does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

_ROWS, _DEPTH = 64, 128  # outputs and inputs of a block
_BLOCK = 32, 256  # the shape of a packed block: a copy takes 256 of an axis at most
_SHARED_BYTES = 222 * 1024  # of a multiprocessor that CTAs may take
_MOST_STAGES = 8
_PADDED = 768  # outputs are padded to multiples, which all tilings divide
_WGMMA = plgpu.Layout.WGMMA
_PACKED = plgpu.Layout.WG_STRIDED(_BLOCK, vec_size=16)


class Int8Weight(NamedTuple):
    """A matrix in 8 bits: `values * scale[:, None]` is [out, in]."""

    values: jax.Array  # int8 [out, in]
    scale: jax.Array  # float32 [out]


class PackedWeight(NamedTuple):
    """The same for the kernel, see `pack`; outputs may be padded."""

    values: jax.Array  # int8 [out / 64, in / 128, 32, 256]
    scale: jax.Array  # float32 [out]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the kernel is cut.

    Raises:
      ValueError: a size that the kernel does not have.
    """

    groups: int = 4  # warpgroups of a CTA that multiply, 64 outputs each
    parts: int = 1  # cuts of the long axis
    ctas: int = 1  # of a multiprocessor, which share its memory

    def __post_init__(self):
        if min(self.groups, self.parts, self.ctas) < 1:
            raise ValueError(f"{self}: all sizes are at least 1")

    @property
    def outputs(self):
        """Outputs of a CTA."""
        return self.groups * _ROWS

    def stages(self, num_tokens):
        """Steps of weights and tokens in flight."""
        step = _DEPTH * (self.groups * _ROWS + 2 * num_tokens)
        return min(_MOST_STAGES, _SHARED_BYTES // self.ctas // step)

    def serves(self, num_tokens, size_in, size_out, out_bytes=4):
        """Whether the kernel can be cut like this for a product."""
        stages = self.stages(num_tokens)
        return (
            _padded(size_out) % self.outputs == 0
            and size_in % (_DEPTH * self.parts) == 0
            and num_tokens % 8 == 0
            and stages >= 2
            and stages * _DEPTH >= num_tokens * out_bytes  # results take their place
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xla:
    """The product as XLA makes it: a dot whose weights are converted."""

    parts: int = 1

    def serves(self, num_tokens, size_in, size_out, out_bytes=4):
        """Whether the long axis can be cut like this."""
        return size_in % self.parts == 0


def quantise(kernel: jax.Array) -> Int8Weight:
    """The 8-bit form of a kernel [in, ...], one scale for each output."""
    flat = kernel.reshape(kernel.shape[0], -1).T.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(flat).max(1), 1e-30) / 127
    values = jnp.round(flat / scale[:, None]).astype(jnp.int8)
    return Int8Weight(values, scale)


def _padded(size_out):
    """Outputs of a packed weight; a few are never padded much."""
    return size_out if size_out % 512 == 0 else -(-size_out // _PADDED) * _PADDED


def pack(weight: Int8Weight) -> PackedWeight:
    """The form that the kernel reads.

    Of 64 outputs by 16 inputs the matrix unit wants of thread 32 w + 4 r + c the rows
    16 w + r and that + 8, and of both the inputs 2c, 2c + 1, 8 + 2c and 9 + 2c. Here a
    thread finds those of 64 inputs of one row as 16 neighbours, first of one row, then
    of the other, then the same of the next 64 inputs; threads lie behind each other.
    """
    size_out, size_in = weight.values.shape
    padding = _padded(size_out) - size_out
    values = jnp.pad(weight.values, ((0, padding), (0, 0)))
    axes = "tile warp half row | step block group side column pair"
    sizes = dict(warp=4, half=2, row=8, block=2, group=4, side=2, column=4, pair=2)
    sizes |= dict(tile=len(values) // _ROWS, step=size_in // _DEPTH)
    names = axes.replace("|", "").split()
    cut = values.reshape([sizes[name] for name in names])
    order = "tile step block half warp row column group side pair".split()
    turned = cut.transpose([names.index(name) for name in order])
    return PackedWeight(
        turned.reshape(sizes["tile"], sizes["step"], *_BLOCK),
        jnp.pad(weight.scale, (0, padding)),
    )


def multiply(x: jax.Array, weight, how, dtype, size_out=None) -> jax.Array:
    """x [T, in] times a weight: [T, out] in `dtype`, or float32 parts [P, T, out].

    Args:
      weight: PackedWeight for a Tiling, else Int8Weight.
      how: a Tiling (GPU) or Xla; more than one part gives parts.
      size_out: outputs, if the weight is padded.

    Raises:
      ValueError: the product cannot be cut like this.
    """
    if isinstance(how, Tiling) != isinstance(weight, PackedWeight):
        raise ValueError(f"{how} does not take a {type(weight).__name__}")
    dtype = jnp.dtype(dtype if how.parts == 1 else jnp.float32)
    size_out = size_out or len(weight.scale)
    sizes = x.shape[0], x.shape[1], size_out
    if not how.serves(*sizes, dtype.itemsize):
        raise ValueError(f"{how} does not fit tokens, inputs and outputs {sizes}")
    if isinstance(how, Xla):
        return _by_xla(x, weight, how.parts, dtype)
    made = _by_kernel(x, *weight, tiling=how, dtype=dtype, size_out=size_out)
    return made[0] if how.parts == 1 else made


def _by_xla(x, weight, parts, dtype):
    values = weight.values.astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dot = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    if parts == 1:
        made = dot(x, values, (((1,), (1,)), ((), ())))
    else:
        cut = x.reshape(len(x), parts, -1), values.reshape(len(values), parts, -1)
        made = dot(*cut, (((2,), (2,)), ((1,), (1,))))
    return (made * weight.scale).astype(dtype)


def _swizzled(itemsize):
    """Shared memory that the matrix unit and copies read without conflicts."""
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)


@plgpu.inline_mgpu(
    arg_types=(_PACKED,),
    return_type=plgpu.ShapeDtypeStruct((_ROWS, _DEPTH), jnp.bfloat16, layout=_WGMMA),
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
    made = np.empty(layout.registers_shape((_ROWS, _DEPTH)), dtype=object)
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


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("tiling", "dtype", "size_out"))
def _by_kernel(x, values, scale, *, tiling: Tiling, dtype, size_out):
    """Returns parts [P, T, out] of the product, P = 1 in `dtype`."""
    num_tokens, size_in = x.shape
    cut, stages = tiling, tiling.stages(num_tokens)
    steps = size_in // _DEPTH // cut.parts

    def body(x_ref, values_ref, scale_ref, out_ref, shared, x_s, full, free):
        values_s, out_s = shared
        part, group = lax.axis_index("part"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile") * cut.groups

        def copy(step, _):
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _wait():
                plgpu.barrier_wait(free.at[slot])

            step, bar = part * steps + step, full.at[slot]
            for i in range(cut.groups):
                block = values_ref.at[tile + i, step]
                plgpu.copy_gmem_to_smem(block, values_s.at[i, slot], bar)
            inputs = pl.ds(pl.multiple_of(step * _DEPTH, _DEPTH), _DEPTH)
            plgpu.copy_gmem_to_smem(x_ref.at[:, inputs], x_s.at[slot], bar)

        def load(step):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            return plgpu.load(values_s.at[group, slot], layout=_PACKED)

        def multiply(sums, step, packed, then=None):
            slot = lax.rem(step, stages)
            plgpu.wgmma(sums, _widen(packed), x_s.at[slot].T)
            following = None if then is None else then()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])
            return following

        @pl.when(group == cut.groups)
        def _copy():
            lax.fori_loop(0, steps, copy, None)

            def drain(step, _):
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

            lax.fori_loop(max(steps - stages, 0), steps, drain, None)

        @pl.when(group < cut.groups)
        def _compute():
            def run(sums):
                # While a step is multiplied the next one is loaded.
                def one(step, packed):
                    return multiply(sums, step, packed, lambda: load(step + 1))

                last = lax.fori_loop(0, steps - 1, one, load(jnp.int32(0)))
                multiply(sums, jnp.int32(steps - 1), last)
                return sums[...]

            sums = pl.run_scoped(run, plgpu.ACC((_ROWS, num_tokens), jnp.float32))
            start = pl.multiple_of((tile + group) * _ROWS, _ROWS)
            outputs = pl.ds(start, _ROWS)
            factor = plgpu.load(
                scale_ref.at[outputs], layout=_WGMMA.reduce(1), optimized=False
            )
            sums = (sums * lax.broadcast_in_dim(factor, sums.shape, [0])).astype(dtype)
            place = out_s.at[group, pl.ds(0, num_tokens)]
            place.T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            # Copies leave out what lies behind the outputs.
            plgpu.copy_smem_to_gmem(place, out_ref.at[part, :, outputs])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((cut.parts, num_tokens, size_out), dtype),
        grid=(len(scale) // cut.outputs, cut.parts),
        grid_names=("tile", "part"),
        num_threads=cut.groups + 1,
        thread_name="warpgroup",
        kernel_name="int8_product",
        scratch_types=_scratch(cut, stages, num_tokens, x.dtype, dtype),
    )(x, values, scale)


def _scratch(cut, stages, num_tokens, x_dtype, dtype):
    """Returns shared memory and barriers of a CTA; a warpgroup has its own weights.

    Results take the place of the weights, of which none are left then.
    """
    item = jnp.dtype(dtype).itemsize
    values = cut.groups, stages, *_BLOCK
    results = cut.groups, stages * _DEPTH // item, _ROWS
    return [
        plgpu.RefUnion(
            plgpu.SMEM(values, jnp.int8),
            plgpu.SMEM(results, dtype, transforms=_swizzled(item)),
        ),
        plgpu.SMEM((stages, num_tokens, _DEPTH), x_dtype, transforms=_swizzled(2)),
        plgpu.Barrier(num_arrivals=1 + cut.groups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=cut.groups, num_barriers=stages),
    ]
