"""Product of few rows with a weight in 8 bits for TPU (Pallas Mosaic TPU).

A grid step loads a block of the weight, widens it in VMEM and adds its product to a
float32 sum, which is multiplied by the scales after the last inputs. Outputs behind the
last one are computed of whatever lies there, and not stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.array_types import FewRows, Int8Values, OutputScale, ProductParts
from pallas_kernels.int8_matmul.weights import Int8Weight, PackedWeight

_LANES = 128
_ROW_UNIT = 16  # rows of bfloat16 in one tile of VMEM
_MOST_ROWS = 1024
_MOST_OUTPUTS, _MOST_INPUTS = 512, 2048  # of a block
_MOST_ODD_INPUTS = 4096  # of a block that lanes do not divide


def pack_tpu(weight: Int8Weight, *, interpret: bool = False) -> PackedWeight:
    """Returns the weight as it is."""
    del interpret
    return PackedWeight(*weight)


@functools.partial(jax.jit, static_argnames=("parts", "interpret"))
def int8_matmul_tpu(
    x: FewRows,
    values: Int8Values,
    scale: OutputScale,
    *,
    parts: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> ProductParts:
    """Returns what `api.int8_matmul` documents, computed on a TPU.

    Raises:
      NotImplementedError: more rows, or other inputs of a part, than the kernel has.
    """
    (num_rows, size_in), size_out = x.shape, len(scale)
    count = parts or 1
    inputs = _inputs_of_block(size_in // count, count)
    if num_rows > _MOST_ROWS:
        raise NotImplementedError(
            f"x has {num_rows} rows: the TPU kernel takes {_MOST_ROWS} at most; "
            "impl='reference' serves every size"
        )
    missing = -num_rows % _ROW_UNIT
    if missing:
        # What lies in rows behind the last one must not matter.
        filling = jnp.nan if interpret else 0
        x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=filling)
    outputs, blocks = min(_MOST_OUTPUTS, size_out), size_in // count // inputs
    rows = num_rows + missing
    made = pl.pallas_call(
        functools.partial(_add_block, num_blocks=blocks),
        grid=(count, pl.cdiv(size_out, outputs), blocks),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda p, n, k: (0, p * blocks + k)),
            pl.BlockSpec((outputs, inputs), lambda p, n, k: (n, p * blocks + k)),
            pl.BlockSpec((1, outputs), lambda p, n, k: (0, n)),
        ],
        out_specs=pl.BlockSpec((None, rows, outputs), lambda p, n, k: (p, 0, n)),
        out_shape=jax.ShapeDtypeStruct(
            (count, rows, size_out), x.dtype if parts is None else jnp.float32
        ),
        scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="int8_matmul",
    )(x, values, scale[None])[:, :num_rows]
    return made[0] if parts is None else made


def _inputs_of_block(size, parts):
    """Returns how many of the inputs of a part are multiplied at once."""
    whole = size // _LANES
    if size % _LANES == 0:
        most = _MOST_INPUTS // _LANES
        return _LANES * max(n for n in range(1, most + 1) if whole % n == 0)
    if parts > 1 or size > _MOST_ODD_INPUTS:
        raise NotImplementedError(
            f"a part has {size} inputs: the TPU kernel takes multiples of {_LANES}, "
            f"or {_MOST_ODD_INPUTS} at most in one part; impl='reference' serves every "
            "size"
        )
    return size


def _add_block(x_ref, values_ref, scale_ref, out_ref, sums_ref, *, num_blocks):
    """Adds the product of a block; after the last one the result is there."""
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _start():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += lax.dot_general(
        x_ref[...],
        values_ref[...].astype(x_ref.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(block == num_blocks - 1)
    def _finish():
        out_ref[...] = (sums_ref[...] * scale_ref[...]).astype(out_ref.dtype)
