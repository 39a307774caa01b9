"""One layer of the transformer, and the maps that it is made of.

A call of a `Layer` computes all of it, each product in a launch of its own. Where
`is_chained`, one launch of `dense_chain` does what lies between two attentions; a layer
then brings its weights (`chain_weights`, `entry`) and its attention (`attended`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels.add_norm import add_norm
from pallas_kernels.common import is_for_gpu, rms_norm
from pallas_kernels.dense_chain import ChainWeights
from pallas_kernels.dense_chain.plan import chain_fits
from pallas_kernels.rotate_heads import rotate_heads
from sparsespec_jax.model_config import ModelConfig

Cache = Any  # one layer's cache: any pytree, read and replaced by attend alone
# (layer_index, q [T, N, D], rows [T, H, K V], cache) -> out [T, N, D], cache
Attend = Callable[[int, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]

_PART_ELEMENTS = 2**21  # of the parts of a product, so that they stay in L2


def contract(x: jax.Array, kernel: jax.Array, out_dtype, *, axis=0) -> jax.Array:
    """x [T, in] times kernel, whose axis `axis` is `in`; float32 accumulation."""
    # TF32 passes of a GPU would break exactness in float32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        kernel,
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype,
    )


def _contract_in_parts(x: jax.Array, kernel: jax.Array, parts: int) -> jax.Array:
    """x [T, in] times kernel [in, N] over `parts` cuts of `in`: float32 [parts, T, N].

    The sum over the parts is the product. XLA cuts products of few tokens like this by
    itself on GPUs, but sums them in a launch of its own; `add_norm` takes them as they
    are.
    """
    return jax.lax.dot_general(
        x.reshape(x.shape[0], parts, -1),
        kernel.reshape(parts, -1, kernel.shape[1]),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.float32,
    )


def _num_parts(num_tokens: int, size_in: int, size_out: int) -> int:
    """Cuts of a product of so many tokens on a GPU: a power of 2 up to 8."""
    parts = 8
    while parts > 1 and (
        parts * num_tokens * size_out > _PART_ELEMENTS
        or size_in % parts
        or size_in < 128 * parts
    ):
        parts //= 2
    return parts


class Projection(nn.Module):
    """Affine map [T, in] -> [T, *features]; kernel [in, *features]."""

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = False
    out_dtype: Any = None  # None: dtype
    may_split: bool = False  # the result may be parts, see _contract_in_parts

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the projected x, in out_dtype; or float32 parts of it."""
        init = nn.initializers.lecun_normal()
        shape = (x.shape[-1], *self.features)
        kernel = self.param("kernel", init, shape, self.dtype)
        if self.may_split and not self.use_bias:
            parts = _num_parts(x.shape[0], *shape)
            if parts > 1:
                return _contract_in_parts(x, kernel.astype(self.dtype), parts)
        y = contract(x, kernel.astype(self.dtype), self.out_dtype or self.dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, self.features, self.dtype)
            y = y + bias.astype(self.dtype)[None]
        return y

    @nn.nowrap
    def kernel_alone(self) -> jax.Array:
        """Return the kernel, of a projection that has been initialised."""
        return self.get_variable("params", "kernel").astype(self.dtype)


class Scale(nn.Module):
    """The learnt factor [size] of a norm."""

    size: int
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return the factor."""
        ones = nn.initializers.ones_init()
        return self.param("scale", ones, (self.size,), self.dtype)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x [..., n] normalised and scaled, in dtype."""
        ones = nn.initializers.ones_init()
        scale = self.param("scale", ones, (x.shape[-1],), self.dtype)
        return rms_norm(x.astype(jnp.float32), scale, self.eps).astype(self.dtype)


class Layer(nn.Module):
    """One pre-norm block: attention, then gated MLP, each added to the stream.

    What the MLP adds is left to the next norm, which takes the sum in the same launch.
    """

    config: ModelConfig
    dtype: Any
    index: int
    impl: str | None

    def setup(self):
        """Declare the submodules; their names are the parameter names."""
        c, dtype = self.config, self.dtype
        splits = dtype == jnp.bfloat16 and is_for_gpu(self.impl)
        scale = functools.partial(Scale, c.hidden_size, dtype)
        project = functools.partial(
            Projection, (c.hidden_size,), dtype, may_split=splits
        )
        # The first stream has no addend yet.
        self.input_norm = scale() if self.index else RmsNorm(c.norm_eps, dtype)
        self.qkv = Projection(self._heads, dtype, c.attention_bias)
        if c.qk_norm:
            self.q_norm = Scale(c.head_dim, dtype)
            self.k_norm = Scale(c.head_dim, dtype)
        self.out = project(use_bias=c.attention_out_bias)
        self.mlp_norm = scale()
        self.gate_up = Projection((2, c.intermediate_size), dtype, c.mlp_bias)
        self.down = project(use_bias=c.mlp_bias)

    def __call__(self, x, y, cos, sin, attend: Attend, cache: Cache):
        """Return stream and addend [T, hidden] after this block, and its new cache.

        x, y: stream and addend before it; no addend (None) before the first block. An
        addend may be the parts of a product.
        """
        norm = functools.partial(add_norm, eps=self.config.norm_eps, impl=self.impl)
        if y is None:
            qkv = self.first(x)
        else:
            x, normed = norm(x, y, self.input_norm())
            qkv = self.qkv(normed)
        mixed, cache = self.attended(qkv, cos, sin, attend, cache)
        x, normed = norm(x, self.out(mixed), self.mlp_norm())
        inner = self.gate_up(normed)
        return x, self.down(nn.silu(inner[:, 0]) * inner[:, 1]), cache

    # What follows stays in the name scope of its caller.

    @nn.nowrap
    def first(self, x):
        """Return the projection to heads of the first stream [T, hidden]."""
        return self.qkv(self.input_norm(x))

    @nn.nowrap
    def attended(self, qkv, cos, sin, attend: Attend, cache: Cache):
        """Return attention's result [T, N * D] and the new cache.

        qkv: [T, H, G + 2, D], or parts [P, T, H * (G + 2) * D] of it.
        """
        c, scales = self.config, ()
        if qkv.ndim == 3:
            qkv = qkv.reshape(*qkv.shape[:2], *self._heads)
        if c.qk_norm:
            scales = self.q_norm(), self.k_norm()
        q, rows = rotate_heads(
            qkv, cos, sin, *scales, eps=c.norm_eps, dtype=self.dtype, impl=self.impl
        )
        mixed, cache = attend(self.index, q, rows, cache)
        return mixed.astype(self.dtype).reshape(mixed.shape[0], -1), cache

    @nn.nowrap
    def chain_weights(self, next_norm, qkv) -> ChainWeights:
        """Return the weights from this layer's attention to the next one's heads.

        next_norm, qkv: the `entry` of the next layer; or the last norm and None.
        """
        out, gate_up, down = (
            part.kernel_alone() for part in (self.out, self.gate_up, self.down)
        )
        return ChainWeights(out, self.mlp_norm(), gate_up, down, next_norm, qkv)

    @nn.nowrap
    def entry(self):
        """Return the factor of the input norm and the projection [hidden, Q]."""
        return self.input_norm(), self.qkv.kernel_alone().reshape(
            self.config.hidden_size, -1
        )

    @property
    def _heads(self):
        c = self.config
        return c.num_kv_heads, c.group_size + 2, c.head_dim


def is_chained(config: ModelConfig, dtype, impl: str | None, num_tokens: int) -> bool:
    """Return whether `dense_chain` does the dense work of every layer."""
    c = config
    has_bias = c.attention_bias or c.attention_out_bias or c.mlp_bias
    if not is_for_gpu(impl) or dtype != jnp.bfloat16 or has_bias:
        return False
    mixed, rows = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    sizes = num_tokens, mixed, c.hidden_size, c.intermediate_size
    # The last layer projects to no heads; it may be the only one.
    widths = (mixed + rows, None) if c.num_layers > 1 else (None,)
    return all(chain_fits(*sizes, width) for width in widths)
