"""The transformer over a flat token axis; the caller brings the attention.

A step mixes tokens of many requests, so the model sees tokens [T] and positions
[T] and nothing of requests or caches: each layer hands its rotated queries and its new
KV rows to ``attend``, which owns the KV cache. Parameters are a plain nested dict::

    embed/weight            [V, hidden]
    layer_I/input_norm      scale [hidden]
    layer_I/qkv             kernel [hidden, H, G+2, D]   bias [H, G+2, D]
    layer_I/q_norm, k_norm  scale [D]
    layer_I/out             kernel [N*D, hidden]         bias [hidden]
    layer_I/mlp_norm        scale [hidden]
    layer_I/gate_up         kernel [hidden, 2, inner]    bias [2, inner]
    layer_I/down            kernel [inner, hidden]       bias [hidden]
    final_norm              scale [hidden]
    lm_head                 kernel [hidden, V]           (untied only)

Projections of one input are fused when loading, so a step runs few wide matmuls
whatever the compiler would have merged. The fused output axes keep KV heads and inner
units apart, so either can be sharded over devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pallas_kernels.add_norm import add_norm
from pallas_kernels.common import is_for_gpu, rms_norm, sum_of_parts
from pallas_kernels.rotate_heads import rotate_heads
from sparsespec_jax.array_types import (
    Features,
    Logits,
    PerToken,
    Queries,
    RopeTable,
    RowsOfHeads,
    Stream,
    StreamParts,
    StreamRows,
    TokenInputs,
)
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.products import (
    DOWN_CUTS,
    HEADS_CUTS,
    OUT_CUTS,
    Projection,
    contract,
)
from sparsespec_jax.models.rope import rope_tables

Cache = Any  # one layer's cache: any pytree, read and replaced by attend alone
Params = dict[str, Any]
Attend = Callable[[int, Queries, RowsOfHeads, Cache], tuple[Queries, Cache]]

_MASKED = float(np.finfo(np.float32).min)


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

    @nn.compact
    def __call__(
        self,
        x: Stream,
        y: StreamParts | None,
        cos: RopeTable,
        sin: RopeTable,
        attend: Attend,
        cache: Cache,
    ) -> tuple[Stream, StreamParts, Cache]:
        """Return stream and addend after this block, and its new cache.

        x, y: stream and addend before it; no addend (None) before the first block. An
        addend may be the parts of a product.
        """
        c = self.config
        scale = functools.partial(Scale, c.hidden_size, self.dtype)
        norm = functools.partial(add_norm, eps=c.norm_eps, impl=self.impl)
        if y is None and self.exact:  # by the kernel, whose rows stand alone
            y = jnp.zeros_like(x)
        if y is None:
            normed = RmsNorm(c.norm_eps, self.dtype, name="input_norm")(x)
        else:
            x, normed = norm(x, y, scale(name="input_norm")())
        q, rows = self._queries_and_rows(normed, cos, sin)
        mixed, cache = attend(self.index, q, rows, cache)
        mixed = mixed.astype(self.dtype).reshape(x.shape[0], -1)
        project = functools.partial(
            Projection, (c.hidden_size,), self.dtype, exact=self.exact
        )
        cuts = self._if_summed(OUT_CUTS)
        y = project(c.attention_out_bias, cuts=cuts, name="out")(mixed)
        x, normed = norm(x, y, scale(name="mlp_norm")())
        inner = Projection(
            (2, c.intermediate_size), self.dtype, c.mlp_bias, exact=self.exact,
            name="gate_up",
        )(normed)  # fmt: skip
        gated = nn.silu(inner[:, 0]) * inner[:, 1]
        y = project(c.mlp_bias, cuts=self._if_summed(DOWN_CUTS), name="down")(gated)
        return x, y, cache

    @nn.nowrap
    def _if_summed(self, cuts):
        """The cuts, None where no kernel would sum the parts."""
        is_summed = self.dtype == jnp.bfloat16 and is_for_gpu(self.impl)
        return cuts if is_summed else None

    def _queries_and_rows(self, x, cos, sin):
        c, scales = self.config, ()
        features = (c.num_kv_heads, c.group_size + 2, c.head_dim)
        qkv = Projection(
            features, self.dtype, c.attention_bias,
            cuts=self._if_summed(HEADS_CUTS), exact=self.exact, name="qkv",
        )(x)  # fmt: skip
        if c.qk_norm:
            names = "q_norm", "k_norm"
            scales = (Scale(c.head_dim, self.dtype, name=name)() for name in names)
        return rotate_heads(
            qkv, cos, sin, *scales, eps=c.norm_eps, dtype=self.dtype, impl=self.impl
        )


class Embedding(nn.Module):
    """Token table [V, hidden], read by row and, if tied, as output projection."""

    config: ModelConfig
    dtype: Any
    exact: bool = False

    def setup(self):
        """Declare the table."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(0.02)
        self.weight = self.param("weight", init, shape, self.dtype)

    def __call__(self, tokens: PerToken) -> Stream:
        """Rows of tokens."""
        return self.weight[tokens].astype(self.dtype)

    def project(self, hidden: StreamRows) -> Logits:
        """Products of hidden states with every row."""
        weight = self.weight.astype(self.dtype)
        return contract(hidden, weight, jnp.float32, axis=1, exact=self.exact)


class Transformer(nn.Module):
    """Decoder-only transformer. Layers are unrolled, one weight array each.

    A scan over stacked weights takes twice as long on GPUs: each iteration copies
    its slice of the weights.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    impl: str | None = None  # of the kernels; None: that of the platform
    exact: bool = False  # products whose rows do not depend on the others

    def setup(self):
        """Declare the submodules; their names are the parameter names."""
        c, exact = self.config, self.exact
        self.embed = Embedding(c, self.dtype, exact)
        self.layer = [
            Layer(c, self.dtype, i, self.impl, exact) for i in range(c.num_layers)
        ]
        self.final_norm = Scale(c.hidden_size, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = Projection(
                (c.vocab_size,), self.dtype, out_dtype=jnp.float32, exact=exact
            )

    def __call__(
        self,
        tokens: PerToken,
        positions: PerToken,
        attend: Attend,
        caches: tuple[Cache, ...],
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Stream, tuple[Cache, ...], Features | None]:
        """Normed hidden states of tokens at positions.

        caches: one pytree a layer, passed through attend and returned in order. The
        third value holds the streams behind `feature_layers`, side by side.
        """
        # The barrier keeps layers from evaluating the angles again, each for itself.
        tables = jax.lax.optimization_barrier(rope_tables(positions, self.config))
        x, y = self.embed(tokens), None
        new_caches, streams = [], []
        for layer, cache in zip(self.layer, caches, strict=True):
            x, y, cache = layer(x, y, *tables, attend, cache)
            new_caches.append(cache)
            streams.append((x, y))
        features = [
            streams[i][0] + sum_of_parts(streams[i][1], self.dtype)
            for i in feature_layers
        ]
        features = jnp.concatenate(features, -1) if features else None
        scale, eps = self.final_norm(), self.config.norm_eps
        _, hidden = add_norm(x, y, scale, eps=eps, impl=self.impl)
        return hidden, tuple(new_caches), features

    def logits(self, hidden: StreamRows) -> Logits:
        """Next-token logits of normed hidden states."""
        hidden = hidden.astype(self.dtype)
        if self.config.tie_embeddings:
            return self.embed.project(hidden)
        return self.lm_head(hidden)

    def everything(self, tokens: PerToken) -> Logits:
        """Logits of one text: touches every parameter, for init."""
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        caches = (None,) * self.config.num_layers
        return self.logits(self(tokens, positions, causal_attend, caches)[0])


def forward(
    config: ModelConfig,
    params: Params,
    tokens: PerToken,
    positions: PerToken,
    attend: Attend,
    caches: tuple[Cache, ...],
    *,
    impl: str | None = None,
    exact: bool = False,
) -> tuple[Stream, tuple[Cache, ...]]:
    """Normed hidden states and new caches; computes in the params' dtype.

    tokens, positions: of any mix of requests; ids must lie in [0, V).
    impl: of the kernels, one of `pallas_kernels.IMPLS`; None: that of the platform.
    exact: the bits of a row do not depend on the other rows (see `products`).
    """
    args = config, params, tokens, positions, attend, caches
    return forward_with_features(*args, impl=impl, exact=exact)[:2]


def forward_with_features(
    config: ModelConfig,
    params: Params,
    tokens: PerToken,
    positions: PerToken,
    attend: Attend,
    caches: tuple[Cache, ...],
    feature_layers: tuple[int, ...] = (),
    *,
    impl: str | None = None,
    exact: bool = False,
) -> tuple[Stream, tuple[Cache, ...], Features | None]:
    """As `forward`, and the streams behind `feature_layers` side by side, or None."""
    module = Transformer(config, dtype=params_dtype(params), impl=impl, exact=exact)
    return module.apply(
        {"params": params}, tokens, positions, attend, caches, feature_layers
    )


def logits(
    config: ModelConfig, params: Params, hidden: StreamRows, *, exact: bool = False
) -> Logits:
    """Next-token logits of hidden states; `exact` as in `forward`."""
    module = Transformer(config, dtype=params_dtype(params), exact=exact)
    return module.apply({"params": params}, hidden, method="logits")


def params_dtype(params: Params) -> np.dtype:
    """The dtype that the model computes in: that of its embedding table."""
    return params["embed"]["weight"].dtype


def param_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree with a jax.ShapeDtypeStruct in place of each array."""
    module = Transformer(config, dtype=dtype, impl="reference")
    init = functools.partial(module.init, method="everything")
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(init, jax.random.key(0), tokens)["params"]


def init_params(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
    """Random parameters with the spread of a trained model, made on the device.

    One layer is made at a time, by a generator compiled once for all layers, so
    nothing large is needed beside the result. Biases are random too (a lost bias
    must change the output), norm scales are near 1.
    """
    shapes = param_shapes(config, dtype)
    layers = [shapes.pop(f"layer_{i}") for i in range(config.num_layers)]
    key = jax.random.key(seed)
    params = {
        name: _random_tree(key, shape, position=index)
        for index, (name, shape) in enumerate(sorted(shapes.items()))
    }
    for index, layer in enumerate(layers, start=len(params)):
        name = f"layer_{index - len(shapes)}"
        params[name] = _random_tree(key, layer, position=index)
    return params


def _random_tree(key: jax.Array, shapes: Params, *, position: int) -> Params:
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    spec = tuple((path[-1].key, leaf.shape, leaf.dtype) for path, leaf in flat)
    made = _random_arrays(jax.random.fold_in(key, position), spec=spec)
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnames="spec")
def _random_arrays(key, *, spec):
    # One draw for all: compiling a draw for each shape takes seconds.
    sizes = [math.prod(shape) for _, shape, _ in spec]
    noise = jax.random.normal(key, (sum(sizes),))
    parts = jnp.split(noise, np.cumsum(sizes)[:-1])
    made = []
    for (name, shape, dtype), part in zip(spec, parts, strict=True):
        # Kernels keep the size of what they project; 2500: tables as trained, 0.02.
        fan_in = shape[0] if name == "kernel" else 2500
        mean = 1.0 if name == "scale" else 0.0
        made.append((mean + fan_in**-0.5 * part.reshape(shape)).astype(dtype))
    return made


def causal_attend(
    layer_index: int, q: Queries, rows: RowsOfHeads, cache: Cache
) -> tuple[Queries, Cache]:
    """Plain causal attention among the T tokens given, taken as one text in order.

    rows: K then V. For tests and for scoring a text: scores are float32 [T, N, T].
    """
    del layer_index
    num_tokens, num_heads, head_dim = q.shape
    k, v = jnp.split(rows, 2, axis=-1)
    grouped = q.reshape(num_tokens, k.shape[1], -1, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=jnp.float32
    )
    scores = product("ihgd,jhd->hgij", grouped, k) * head_dim**-0.5
    visible = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    scores = jnp.where(visible[None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("hgij,jhd->ihgd", weights, v)
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype), cache
