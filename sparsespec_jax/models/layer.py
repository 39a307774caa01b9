"""One block of the transformer, over groups of rows."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pallas_kernels.add_norm import add_norm
from pallas_kernels.common import is_for_gpu, rms_norm
from pallas_kernels.rotate_heads import rotate_heads
from sparsespec_jax.array_types import (
    GroupAddend,
    GroupAngles,
    GroupStream,
    Queries,
    RowsOfHeads,
    TokenInputs,
)
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.products import (
    DOWN_CUTS,
    HEADS_CUTS,
    OUT_CUTS,
    Projection,
    exact_parts,
)

_ALIGNMENT = 256  # bytes: of what a GPU kernel is given

Cache = Any  # one layer's cache: any pytree, read and replaced by attend alone
Attend = Callable[[int, Queries, RowsOfHeads, Cache], tuple[Queries, Cache]]


class RowGroup(NamedTuple):
    """Rows of a step that go through the products of a layer together."""

    x: GroupStream
    y: GroupAddend | None  # what the last block adds; None before the first one
    cos: GroupAngles
    sin: GroupAngles
    is_prompt: bool  # of prompt chunks, in exact numerics: see `products`


def joined(parts: Sequence) -> Any:
    """Arrays of the groups, one behind the other; the array itself if it is one."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _split(rows, groups):
    """Rows of all groups as those of each."""
    if len(groups) == 1:
        return [rows]
    ends = np.cumsum([len(group.x) for group in groups])[:-1].tolist()
    row_bytes = rows.dtype.itemsize * math.prod(rows.shape[1:])
    # XLA hands on the place of a slice without a copy; GPU kernels take aligned ones.
    return [
        part
        if start * row_bytes % _ALIGNMENT == 0
        else jax.lax.optimization_barrier(part)
        for start, part in zip([0, *ends], jnp.split(rows, ends), strict=True)
    ]


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
    def __call__(self, x: TokenInputs) -> TokenInputs:
        """Return x normalised and scaled, in dtype."""
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
    exact: bool = False
    in_8_bits: bool = False
    axis: str | None = None  # of a mesh that cuts heads and inner units

    @nn.compact
    def __call__(
        self, groups: list[RowGroup], attend: Attend, cache: Cache
    ) -> tuple[list[RowGroup], Cache]:
        """Return the groups after this block, and its new cache."""
        groups, normed = self._first_norm(groups)
        heads = self._queries_and_rows(groups, normed)
        q, rows = (joined(parts) for parts in zip(*heads, strict=True))
        mixed, cache = attend(self.index, q, rows, cache)
        mixed = mixed.astype(self.dtype).reshape(q.shape[0], -1)
        return self._block(groups, _split(mixed, groups)), cache

    def _first_norm(self, groups):
        """The groups with their addends taken in, and their norms."""
        c = self.config
        if groups[0].y is None and not self.exact:
            norm = RmsNorm(c.norm_eps, self.dtype, name="input_norm")
            return groups, [norm(group.x) for group in groups]
        scale = Scale(c.hidden_size, self.dtype, name="input_norm")()
        # Before the first block too by the kernel, whose rows stand alone.
        groups = [
            g if g.y is not None else g._replace(y=jnp.zeros_like(g.x)) for g in groups
        ]
        return self._normed(groups, scale)

    def _normed(self, groups, scale):
        norm = functools.partial(add_norm, eps=self.config.norm_eps, impl=self.impl)
        pairs = [norm(group.x, group.y, scale) for group in groups]
        groups = [
            g._replace(x=x, y=None) for g, (x, _) in zip(groups, pairs, strict=True)
        ]
        return groups, [normed for _, normed in pairs]

    def _block(self, groups, mixed):
        """The groups with what attention gave, and the MLP as their addend."""
        c = self.config
        project = functools.partial(
            Projection, dtype=self.dtype, exact=self.exact, impl=self.impl,
            in_8_bits=self.in_8_bits,
        )  # fmt: skip
        out = project(
            (c.hidden_size,), use_bias=c.attention_out_bias,
            cuts=self._if_summed(OUT_CUTS), axis=self.axis, name="out",
        )  # fmt: skip
        down = project(
            (c.hidden_size,), use_bias=c.mlp_bias, cuts=self._if_summed(DOWN_CUTS),
            axis=self.axis, name="down",
        )  # fmt: skip
        gate_up = project((2, c.intermediate_size), use_bias=c.mlp_bias, name="gate_up")
        groups = [
            group._replace(y=out(x, is_prompt=group.is_prompt))
            for group, x in zip(groups, mixed, strict=True)
        ]
        scale = Scale(c.hidden_size, self.dtype, name="mlp_norm")()
        groups, normed = self._normed(groups, scale)
        gated = self._gated(gate_up, groups, normed)
        return [
            group._replace(y=down(x, is_prompt=group.is_prompt))
            for group, x in zip(groups, gated, strict=True)
        ]

    def _gated(self, gate_up, groups, normed):
        """What the MLP takes down, of each group."""

        def gate(x, is_prompt):
            inner = gate_up(x, is_prompt=is_prompt)
            return nn.silu(inner[:, 0]) * inner[:, 1]

        size = self.config.hidden_size, 2 * self.config.intermediate_size
        if len(groups) > 1 and exact_parts(*size) == 1:
            # Nobody cuts it, for few rows or many: the weight is read once for all.
            return _split(gate(joined(normed), is_prompt=True), groups)
        return [
            gate(x, group.is_prompt) for group, x in zip(groups, normed, strict=True)
        ]

    @nn.nowrap
    def _if_summed(self, cuts):
        """The cuts, None where no kernel would sum the parts."""
        is_summed = self.dtype == jnp.bfloat16 and is_for_gpu(self.impl)
        return cuts if is_summed else None

    def _queries_and_rows(self, groups, normed):
        """(queries, KV rows) of each group."""
        c, scales = self.config, ()
        features = (c.num_kv_heads, c.group_size + 2, c.head_dim)
        project = Projection(
            features, self.dtype, c.attention_bias, cuts=self._if_summed(HEADS_CUTS),
            exact=self.exact, impl=self.impl, in_8_bits=self.in_8_bits, name="qkv",
        )  # fmt: skip
        if c.qk_norm:
            names = "q_norm", "k_norm"
            scales = [Scale(c.head_dim, self.dtype, name=name)() for name in names]
        return [
            rotate_heads(
                project(x, is_prompt=group.is_prompt), group.cos, group.sin, *scales,
                eps=c.norm_eps, dtype=self.dtype, impl=self.impl,
            )
            for group, x in zip(groups, normed, strict=True)
        ]  # fmt: skip
