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
from pallas_kernels.common import sum_of_parts
from sparsespec_jax.array_types import (
    Features,
    Logits,
    PerToken,
    Queries,
    RowsOfHeads,
    Stream,
    StreamRows,
)
from sparsespec_jax.models.collectives import summed
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.layer import (
    Attend,
    Cache,
    Layer,
    RowGroup,
    Scale,
    joined,
)
from sparsespec_jax.models.products import Projection, contract
from sparsespec_jax.models.rope import rope_tables
from sparsespec_jax.models.vocabulary import place_of

Params = dict[str, Any]

_MASKED = float(np.finfo(np.float32).min)


class Embedding(nn.Module):
    """Token table [V, hidden], read by row and, if tied, as output projection."""

    config: ModelConfig
    dtype: Any
    exact: bool = False
    axis: str | None = None  # of a mesh that cuts the vocabulary

    def setup(self):
        """Declare the table."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(0.02)
        self.weight = self.param("weight", init, shape, self.dtype)

    def __call__(self, tokens: PerToken) -> Stream:
        """Rows of tokens."""
        if self.axis is None:
            return self.weight[tokens].astype(self.dtype)
        # One device has the row, the others add nothing.
        place = place_of(tokens, len(self.weight), self.axis)
        rows = self.weight.at[place].get(mode="fill", fill_value=0)
        return summed(rows.astype(self.dtype), self.axis)

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
    in_8_bits: bool = False  # products by the weights of `draft_weights`
    # Of a mesh that cuts the model; `config` is then what one device has of it.
    axis: str | None = None

    def setup(self):
        """Declare the submodules; their names are the parameter names."""
        c, exact = self.config, self.exact
        self.embed = Embedding(c, self.dtype, exact, self.axis)
        self.layer = [
            Layer(c, self.dtype, i, self.impl, exact, self.in_8_bits, self.axis)
            for i in range(c.num_layers)
        ]
        self.final_norm = Scale(c.hidden_size, self.dtype)
        if self.in_8_bits or not c.tie_embeddings:
            self.lm_head = Projection(
                (c.vocab_size,), self.dtype, out_dtype=jnp.float32, exact=exact,
                impl=self.impl, in_8_bits=self.in_8_bits,
            )  # fmt: skip

    def __call__(
        self,
        tokens: PerToken,
        positions: PerToken,
        attend: Attend,
        caches: tuple[Cache, ...],
        feature_layers: tuple[int, ...] = (),
        num_prompt: int = 0,
    ) -> tuple[Stream, tuple[Cache, ...], Features | None]:
        """Normed hidden states of tokens at positions.

        caches: one pytree a layer, passed through attend and returned in order. The
        third value holds the streams behind `feature_layers`, side by side. num_prompt:
        how many of the tokens, the last ones, are of prompt chunks.
        """
        split = len(tokens) - num_prompt if self.exact else len(tokens)
        parts = (slice(split), False), (slice(split, None), True)
        groups = [
            self._group(tokens[rows], positions[rows], is_prompt=is_prompt)
            for rows, is_prompt in parts
            if len(tokens[rows])
        ]
        new_caches, streams = [], []
        for layer, cache in zip(self.layer, caches, strict=True):
            groups, cache = layer(groups, attend, cache)
            new_caches.append(cache)
            streams.append(groups)
        features = [
            joined([g.x + sum_of_parts(g.y, self.dtype) for g in streams[i]])
            for i in feature_layers
        ]
        features = jnp.concatenate(features, -1) if features else None
        norm = functools.partial(add_norm, eps=self.config.norm_eps, impl=self.impl)
        scale = self.final_norm()
        hidden = joined([norm(group.x, group.y, scale)[1] for group in groups])
        return hidden, tuple(new_caches), features

    @nn.nowrap
    def _group(
        self, tokens: PerToken, positions: PerToken, *, is_prompt: bool
    ) -> RowGroup:
        # The barrier keeps layers from evaluating the angles again, each for itself.
        tables = jax.lax.optimization_barrier(rope_tables(positions, self.config))
        return RowGroup(self.embed(tokens), None, *tables, is_prompt=is_prompt)

    def logits(self, hidden: StreamRows) -> Logits:
        """Next-token logits of normed hidden states."""
        hidden = hidden.astype(self.dtype)
        if self.config.tie_embeddings and not self.in_8_bits:
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
    num_prompt: int = 0,
    axis: str | None = None,
) -> tuple[Stream, tuple[Cache, ...]]:
    """Normed hidden states and new caches; computes in the params' dtype.

    tokens, positions: of any mix of requests; ids must lie in [0, V).
    impl: of the kernels, one of `pallas_kernels.IMPLS`; None: that of the platform.
    exact: the bits of a row do not depend on the other rows (see `products`).
    num_prompt: how many of the tokens, the last ones, are of prompt chunks.
    axis: of a mesh that cuts the model; `config` and `params` are one device's then.
    """
    args = config, params, tokens, positions, attend, caches
    how = dict(impl=impl, exact=exact, num_prompt=num_prompt, axis=axis)
    return forward_with_features(*args, **how)[:2]


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
    num_prompt: int = 0,
    in_8_bits: bool = False,
    axis: str | None = None,
) -> tuple[Stream, tuple[Cache, ...], Features | None]:
    """As `forward`, and the streams behind `feature_layers` side by side, or None.

    in_8_bits: the parameters are those of `draft_weights`.
    """
    module = Transformer(
        config, dtype=params_dtype(params), impl=impl, exact=exact, in_8_bits=in_8_bits,
        axis=axis,
    )  # fmt: skip
    return module.apply(
        {"params": params}, tokens, positions, attend, caches, feature_layers,
        num_prompt,
    )  # fmt: skip


def logits(
    config: ModelConfig,
    params: Params,
    hidden: StreamRows,
    *,
    impl: str | None = None,
    exact: bool = False,
    in_8_bits: bool = False,
) -> Logits:
    """Next-token logits of hidden states; options as in `forward_with_features`."""
    module = Transformer(
        config, dtype=params_dtype(params), impl=impl, exact=exact, in_8_bits=in_8_bits
    )
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


def init_params(
    config: ModelConfig,
    seed: int,
    dtype: Any = jnp.float32,
    place: Callable[[Params], Params] = lambda params: params,
) -> Params:
    """Random parameters with the spread of a trained model, made on the device.

    One layer is made at a time, by a generator compiled once for all layers, so
    nothing large is needed beside the result. Biases are random too (a lost bias
    must change the output), norm scales are near 1. `place` is given each layer, and
    what is outside of them, under its name, and returns it where it shall be.
    """
    shapes = param_shapes(config, dtype)
    layers = [shapes.pop(f"layer_{i}") for i in range(config.num_layers)]
    key, params = jax.random.key(seed), {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        params |= place({name: _random_tree(key, shape, position=index)})
    for index, layer in enumerate(layers, start=len(params)):
        name = f"layer_{index - len(shapes)}"
        params |= place({name: _random_tree(key, layer, position=index)})
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
