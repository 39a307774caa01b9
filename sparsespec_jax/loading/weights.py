"""From tensors as published ([out, in], one per projection) to our parameter tree.

Loaders of every file format bring one function that reads a tensor by the names
below; shapes are checked and layers fused here, in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsespec_jax.loading.shards import Destination
from sparsespec_jax.models.config import ModelConfig
from sparsespec_jax.models.transformer import Params

# (name of ours, layer index or None) -> the tensor and where it came from
ReadTensor = Callable[[str, int | None], tuple[np.ndarray, str]]
Shapes = dict[str, tuple[int, ...]]

# What the shapes below are made of, for errors.
_MEANINGS = {
    **dict.fromkeys(("embed", "lm_head"), "(vocab_size, hidden_size)"),
    **dict.fromkeys(("final_norm", "input_norm", "mlp_norm"), "(hidden_size,)"),
    **dict.fromkeys(("q_norm", "k_norm"), "(head_dim,)"),
    **dict.fromkeys(("out_bias", "down_bias"), "(hidden_size,)"),
    **dict.fromkeys(("gate_bias", "up_bias"), "(intermediate_size,)"),
    **dict.fromkeys(("gate", "up"), "(intermediate_size, hidden_size)"),
    **dict.fromkeys("kv", "(num_kv_heads * head_dim, hidden_size)"),
    **dict.fromkeys(("k_bias", "v_bias"), "(num_kv_heads * head_dim,)"),
    "q": "(num_heads * head_dim, hidden_size)",
    "q_bias": "(num_heads * head_dim,)",
    "out": "(hidden_size, num_heads * head_dim)",
    "down": "(hidden_size, intermediate_size)",
}


def outer_shapes(config: ModelConfig) -> Shapes:
    """Published shapes of the tensors outside the layers."""
    table = (config.vocab_size, config.hidden_size)
    shapes = {"embed": table, "final_norm": (config.hidden_size,)}
    return shapes if config.tie_embeddings else {**shapes, "lm_head": table}


def layer_shapes(config: ModelConfig) -> Shapes:
    """Published shapes of one layer's tensors, [out, in] for kernels."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    shapes: Shapes = {"input_norm": (hidden,), "mlp_norm": (hidden,)}
    shapes |= {"q": (q_width, hidden), "k": (kv_width, hidden)}
    shapes |= {"v": (kv_width, hidden), "out": (hidden, q_width)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.attention_bias:
        shapes |= {"q_bias": (q_width,), "k_bias": (kv_width,), "v_bias": (kv_width,)}
    if config.attention_out_bias:
        shapes |= {"out_bias": (hidden,)}
    if config.mlp_bias:
        shapes |= {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,)}
    return shapes


def assemble(
    config: ModelConfig, read: ReadTensor, *, dtype, mesh: Mesh | None = None
) -> Params:
    """The parameter tree in dtype, one layer read at a time.

    It is on the default device, or each part on its device of a mesh.

    Beside the parameters there is one layer's worth of what was read, or one table.
    The arrays that read returns belong to the parameters from then on.

    Raises:
        ValueError: a tensor has not the shape that config gives it.
    """

    def checked(name: str, layer: int | None, shape: tuple[int, ...]) -> jax.Array:
        array, origin = read(name, layer)
        if array.shape != shape:
            raise ValueError(
                f"{origin} has shape {array.shape}, but its configuration asks for "
                f"{shape}, which is {_MEANINGS[name]}: the weights and the "
                "configuration are of different models; fetch both again from one "
                "source"
            )
        return destination.put(name, array)

    def table(name: str, shape: tuple[int, ...]) -> jax.Array:
        array = checked(name, None, shape)
        if name == "lm_head":
            return destination.transposed(transpose, array)
        return array.astype(dtype)

    def layer(index: int) -> Params:
        raw = {name: checked(name, index, shape) for name, shape in shapes.items()}
        return destination.fused(fuse, raw)

    destination = Destination(config, mesh)
    transpose = functools.partial(_transpose, dtype=dtype)
    fuse = functools.partial(_fuse_layer, dtype=dtype)
    # Each is waited for: else the host would read ahead of the device, and hold what
    # it has read.
    keys = {"embed": "weight", "final_norm": "scale", "lm_head": "kernel"}
    params: Params = {}
    for name, shape in outer_shapes(config).items():
        params[name] = {keys[name]: jax.block_until_ready(table(name, shape))}
    shapes = layer_shapes(config)
    for index in range(config.num_layers):
        params[f"layer_{index}"] = jax.block_until_ready(layer(index))
    return params


@functools.partial(jax.jit, static_argnames="dtype")
def _transpose(array: jax.Array, *, dtype) -> jax.Array:
    return array.astype(dtype).T


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _fuse_layer(raw: dict[str, jax.Array], *, config: ModelConfig, dtype) -> Params:
    """One layer of the tree; on the device, where transposing is cheap."""
    raw = {name: array.astype(dtype) for name, array in raw.items()}
    layer = {
        name: {"scale": raw[name]}
        for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")
        if name in raw
    }
    kernel = [_by_kv_head(raw[name], config) for name in "qkv"]
    # [H, G+2, D, in] -> [in, H, G+2, D]
    fused = jnp.moveaxis(jnp.concatenate(kernel, axis=1), -1, 0)
    layer["qkv"] = {"kernel": fused}
    layer["out"] = {"kernel": raw["out"].T}
    gate_up = jnp.stack([raw["gate"], raw["up"]])
    layer["gate_up"] = {"kernel": jnp.moveaxis(gate_up, -1, 0)}
    layer["down"] = {"kernel": raw["down"].T}
    if config.attention_bias:
        bias = [_by_kv_head(raw[f"{name}_bias"], config) for name in "qkv"]
        layer["qkv"]["bias"] = jnp.concatenate(bias, axis=1)
    if config.attention_out_bias:
        layer["out"]["bias"] = raw["out_bias"]
    if config.mlp_bias:
        layer["gate_up"]["bias"] = jnp.stack([raw["gate_bias"], raw["up_bias"]])
        layer["down"]["bias"] = raw["down_bias"]
    return layer


def _by_kv_head(array: jax.Array, config: ModelConfig) -> jax.Array:
    """[heads * D, ...] -> [H, heads / H, D, ...]."""
    return array.reshape(config.num_kv_heads, -1, config.head_dim, *array.shape[1:])


def require_names(
    source: str, *, expected: Iterable[str], present: Iterable[str]
) -> None:
    """Raise unless the tensors present in source are exactly the expected ones.

    Raises:
        ValueError: tensors are missing or unexpected; the message lists the first.
    """
    expected, present = set(expected), set(present)
    if missing := sorted(expected - present):
        raise ValueError(
            f"{source} lacks {_listed(missing)}: it is incomplete or its configuration "
            "is of another model; fetch it again"
        )
    if unexpected := sorted(present - expected):
        raise ValueError(
            f"{source} holds {_listed(unexpected)}, for which its configuration has no "
            "place: ignoring weights would change the model, so it is refused; check "
            "that the configuration belongs to these weights"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} tensor(s) ({', '.join(names[:4])}{more})"
