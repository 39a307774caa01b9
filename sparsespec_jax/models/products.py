"""Products of tokens with weights: how they are cut over their long axis, and summed.

Fast products are cut as is fastest for their number of tokens, and XLA may cut further.
Exact ones are cut by the shape of the weight alone, into parts that XLA leaves whole,
and summed in the order of the parts: on a GPU the bits of a row then depend on the row
and the weight, not on how many rows there are or which (docs/exactness.md). Parts of
many rows would be many bytes: exact rows of prompt chunks have a kernel that does not
cut. Their bits are others, so a token must always be fed the same way.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels.common import is_for_gpu
from pallas_kernels.int8_matmul import choose_parts, int8_matmul
from pallas_kernels.matmul import matmul
from sparsespec_jax.array_types import Array, Floats, TokenInputs
from sparsespec_jax.models.collectives import summed, summed_in_order


class Cuts(NamedTuple):
    """Into how many parts a product may be cut over its long axis."""

    by_size: tuple[tuple[int, int], ...]  # (most elements of the result, parts)
    shortest: int = 128  # length of a part at least


# What is fastest on an H100 together with the kernel that sums (docs/performance.md).
HEADS_CUTS = Cuts(((2**20, 2),), shortest=1024)
OUT_CUTS = Cuts(((9 * 2**16, 4), (2**20, 2)))
DOWN_CUTS = Cuts(((2**17, 4), (2**18, 8), (2**19, 4), (2**20, 2)))

# XLA leaves a part whole if there are many tiles of results for its length
# (experiments/results/row_bits_h200.json: whole below 24 elements a tile, cut above).
_TILE = 128  # columns
_LONGEST = 22  # elements of a part per tile
_PART_UNIT = 64  # elements
_SHORT = 128  # elements that nobody cuts
_PROMPT_UNIT = 64  # of the kernel for prompt rows
# Fast products of as many rows take it too (experiments/LOG.md, 2026-11-30).
_MANY_ROWS = 1024
_FEWEST_ROWS = 8  # one row is no matrix product, and summed in another order


def exact_parts(size_in: int, size_out: int) -> int:
    """Parts of an exact product, by the shape of its weight [size_in, size_out].

    Raises:
      ValueError: no cut of the weight is known to stay whole.
    """
    if size_in <= _SHORT:
        return 1
    tiles = -(-size_out // _TILE)
    for parts in range(1, size_in // _PART_UNIT + 1):
        is_even = size_in % (parts * _PART_UNIT) == 0
        if is_even and size_in // parts <= _LONGEST * parts * tiles:
            return parts
    raise ValueError(
        f"a product with a weight [{size_in}, {size_out}] has no exact form: use "
        "numerics='fast'"
    )


def weight_shapes(config):
    """(in, out) of the four weights of a layer of a ModelConfig."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_kv_heads * (config.group_size + 2) * config.head_dim
    mixed = config.num_kv_heads * config.group_size * config.head_dim
    return (hidden, heads), (mixed, hidden), (hidden, 2 * inner), (inner, hidden)


def check_products(config):
    """ValueError if a product of a ModelConfig has no exact form."""
    for size_in, size_out in weight_shapes(config):
        exact_parts(size_in, size_out)
        if size_in % _PROMPT_UNIT or size_out % _PROMPT_UNIT:
            raise ValueError(
                f"the exact product of prompt rows with a weight [{size_in}, "
                f"{size_out}] needs multiples of {_PROMPT_UNIT}: use numerics='fast'"
            )
    if exact_parts(config.hidden_size, config.vocab_size) > 1:
        raise ValueError(
            f"a vocabulary of {config.vocab_size} tokens behind "
            f"{config.hidden_size} elements has "
            "no exact product: use numerics='fast'"
        )


def _padded(x):
    """x [T, in] with as many rows as an exact product must have."""
    return jnp.pad(x, ((0, _FEWEST_ROWS - len(x)), (0, 0)))


def contract(x: Array, kernel: Array, out_dtype, *, axis=0, exact=False) -> Array:
    """x [T, in] times kernel, whose axis `axis` is `in`; float32 accumulation."""
    if exact and len(x) < _FEWEST_ROWS:
        return contract(_padded(x), kernel, out_dtype, axis=axis)[: len(x)]
    # TF32 passes of a GPU would break exactness in float32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        kernel,
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype,
    )


def contract_in_parts(x: Array, kernel: Array, parts: int, *, exact=False) -> Array:
    """x [T, in] times kernel [in, N] over `parts` cuts of `in`: float32 [parts, T, N].

    The sum over the parts is the product. XLA cuts products of few tokens like this by
    itself on GPUs, but sums them in a launch of its own; `add_norm` and `rotate_heads`
    take them as they are.
    """
    if exact and len(x) < _FEWEST_ROWS:
        return contract_in_parts(_padded(x), kernel, parts)[:, : len(x)]
    return jax.lax.dot_general(
        x.reshape(x.shape[0], parts, -1),
        kernel.reshape(parts, -1, kernel.shape[1]),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.float32,
    )


def _num_parts(cuts: Cuts, num_tokens: int, size_in: int, size_out: int) -> int:
    """Parts that `cuts` wants of a product, or fewer that its long axis allows."""
    fits = (n for most, n in cuts.by_size if num_tokens * size_out <= most)
    parts = next(fits, 1)
    while parts > 1 and (size_in % parts or size_in < cuts.shortest * parts):
        parts //= 2
    return parts


class Projection(nn.Module):
    """Affine map [T, in] -> [T, *features]; kernel [in, *features]."""

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = False
    out_dtype: Any = None  # None: dtype
    cuts: Cuts | None = None  # given: the result may be parts, see contract_in_parts
    exact: bool = False
    impl: str | None = None  # of the kernels
    in_8_bits: bool = False  # with values and scale in place of the kernel
    axis: str | None = None  # of a mesh that cuts `in`: the devices' products are added

    @nn.compact
    def __call__(self, x: TokenInputs, *, is_prompt: bool = False) -> Floats:
        """Return the projected x, in out_dtype; or float32 parts [P, T, *features].

        is_prompt: of an exact product, that rows of prompt chunks are among x.
        """
        if self.axis is not None:
            return self._added(x, is_prompt=is_prompt)
        if self.in_8_bits:
            return self._in_8_bits(x)
        init = nn.initializers.lecun_normal()
        shape, size_out = (x.shape[-1], *self.features), math.prod(self.features)
        kernel = self.param("kernel", init, shape, self.dtype).astype(self.dtype)
        bias = None
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, self.features, self.dtype)
        is_many = self.dtype == jnp.bfloat16 and is_for_gpu(self.impl)
        is_many &= len(x) >= _MANY_ROWS and not (shape[0] | size_out) % _PROMPT_UNIT
        if is_prompt if self.exact else is_many:
            y = matmul(x, kernel.reshape(-1, size_out), impl=self.impl)
            y = y.reshape(x.shape[0], *self.features)
            return y if bias is None else y + bias
        dtype, parts = self.out_dtype or self.dtype, 1
        if self.exact:
            parts = exact_parts(shape[0], size_out)
        elif self.cuts and bias is None:
            parts = _num_parts(self.cuts, x.shape[0], shape[0], size_out)
        if parts == 1 and self.exact and dtype != jnp.float32:
            # A product that is rounded on its way out may be cut; a float32 one is not.
            y = contract(x, kernel, jnp.float32, exact=True)
            y = jax.lax.optimization_barrier(y)[None]
        elif parts == 1:
            y = contract(x, kernel, dtype, exact=self.exact)
            return y if bias is None else y + bias.astype(self.dtype)[None]
        else:
            flat = kernel.reshape(-1, size_out)
            y = contract_in_parts(x, flat, parts, exact=self.exact)
        y = y.reshape(parts, x.shape[0], *self.features)
        if self.cuts and bias is None:
            return y
        y = functools.reduce(jnp.add, y)
        return (y if bias is None else y + bias.astype(y.dtype)).astype(dtype)

    def _added(self, x, *, is_prompt):
        """What all devices' products sum to, each rounded to `dtype` on its way.

        Exact products are added as they are, in the order of the devices.
        """
        wide = jnp.float32 if self.exact else None
        own = self.clone(
            axis=None, cuts=None, use_bias=False, out_dtype=wide, parent=None, name=None
        )
        names = "kernel", "values", "scale"
        has = [name for name in names if self.has_variable("params", name)]
        params = {name: self.get_variable("params", name) for name in has}
        y = own.apply({"params": params}, x, is_prompt=is_prompt)
        y = summed_in_order(y, self.axis) if self.exact else summed(y, self.axis)
        if self.use_bias:
            y += self.get_variable("params", "bias").astype(y.dtype)
        return y.astype(self.dtype)

    def _in_8_bits(self, x):
        """The projected x by `draft_weights`: bfloat16 by a kernel of its own."""
        read = functools.partial(self.get_variable, "params")
        values, scale = read("values"), read("scale")
        bias, dtype = read("bias"), self.out_dtype or self.dtype
        size_out, is_wide = math.prod(self.features), dtype == jnp.float32
        parts = 1 if is_wide else None
        if x.dtype != jnp.bfloat16:
            y = contract(x, values.astype(x.dtype), jnp.float32, axis=1) * scale
        else:
            if self.cuts and bias is None:
                parts = choose_parts(len(x), x.shape[1], size_out)
            y = int8_matmul(x, values, scale, parts=parts, impl=self.impl)
            if self.cuts and bias is None:
                return y.reshape(parts, len(x), *self.features)
            y = y[0] if is_wide else y
        y = y.reshape(len(x), *self.features)
        return (y if bias is None else y + bias.astype(y.dtype)).astype(dtype)
